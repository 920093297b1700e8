"""A built model folder: what must be in it, and that its three parts belong together.

mlc-chat-config.json says how the model is driven, tensor-cache.json what weights there are, and
the library's `_metadata` what the compiled code expects. Where they disagree the model would
compute something else, silently; so every disagreement is an error here. The rules hold for
folders by mlc_llm as well, which write no "weight_layout" (it is "autoawq" then), no "head" and
"embedding" (they are not quantized then) and no "architecture" into the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import ModelConfig, computed_settings, parse_config
from mlcawq.engine.conversation import Conversation
from mlcawq.engine.library_file import is_cut_short
from mlcawq.errors import Problem, UserError, raise_all

CONFIG = "mlc-chat-config.json"
TENSOR_CACHE = ("tensor-cache.json", "ndarray-cache.json")  # the second is mlc_llm's old name
TOKENIZER = "tokenizer.json"
DEFAULT_LAYOUT = "autoawq"
UNQUANTIZED = "plain"  # a head or an embedding of which nothing is said

# Devices in order of preference, and the names that targets have in file names of libraries.
DEVICES = ("cuda", "rocm", "metal", "vulkan", "opencl", "cpu")
DEVICE_ALIASES = {"llvm": "cpu", "webgpu": "vulkan", "wgpu": "vulkan"}
_SUFFIXES = (".so", ".dylib", ".dll")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a shard. format: "raw" or "f32-to-bf16" (float32 stored as bfloat16)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Shard:
    path: Path
    nbytes: int
    md5: str | None
    tensors: tuple[TensorRecord, ...]


@dataclass(frozen=True)
class BuiltFolder:
    """A folder that has all its parts. libraries: device kind -> file."""

    path: Path
    config: dict[str, Any]
    conversation: Conversation
    shards: tuple[Shard, ...]
    libraries: dict[str, Path]

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


def read_folder(folder: Path, library: Path | None = None) -> BuiltFolder:
    """Read a built folder without loading weights or code.

    library: the compiled library when it is not inside the folder; its device is told by its
    name (…-cuda.so, lib-cpu.so).
    Raises UserError with everything that is missing or wrong, and the command that makes it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError.one(f"the model folder {what}", str(folder), "give a folder made by build")
    if not (folder / CONFIG).is_file():
        raise UserError(_not_a_built_folder(folder))
    problems: list[Problem] = []
    config = _read_json(folder / CONFIG, problems) or {}
    conversation = _read_conversation(folder, config, problems)
    _check_config(folder, config, problems)
    shards = _read_shards(folder, problems)
    if not (folder / TOKENIZER).is_file():
        problems.append(
            Problem(
                f"{TOKENIZER} is missing",
                str(folder),
                "copy it from the original checkpoint, or run `mlcawq gen-config` again",
            )
        )
    libraries = _find_libraries(folder, library, problems)
    raise_all(problems)
    return BuiltFolder(folder, config, conversation, shards, libraries)


def check_library(built: BuiltFolder, metadata: Mapping[str, Any], library: Path) -> None:
    """Raise UserError when a library was not compiled for this folder's config and weights."""
    problems: list[Problem] = []
    where, config = str(library), built.config

    def differ(what: str, ours: object, theirs: object, fix: str) -> None:
        problems.append(Problem(f"{what} is {theirs!r} here but {ours!r} in {CONFIG}", where, fix))

    recompile = f"run `mlcawq compile {built.path}` again"
    for key in ("model_type", "quantization"):
        if metadata.get(key) != config.get(key):
            differ(key, config.get(key), metadata.get(key), recompile)
    layouts = [m.get("weight_layout") or DEFAULT_LAYOUT for m in (config, metadata)]
    if layouts[0] != layouts[1]:
        fix = "convert the weights and compile with the same options"
        differ("weight_layout", layouts[0], layouts[1], fix)
    for key in ("head", "embedding"):
        ours, theirs = (m.get(key) or UNQUANTIZED for m in (config, metadata))
        if ours != theirs:
            differ(key, ours, theirs, recompile)
    window = metadata.get("sliding_window_size") or -1
    if window > 0:
        problems.append(
            Problem(
                f"the library was compiled for a rolling cache of {window} tokens",
                where,
                f"build with --context-window-size {window}, which needs no rolling",
            )
        )
    compiled = metadata.get("context_window_size", -1)
    if 0 < compiled < config.get("context_window_size", -1):
        differ("context_window_size", config["context_window_size"], compiled, recompile)
    for key, only in (("tensor_parallel_shards", 1), ("pipeline_parallel_stages", 1)):
        if metadata.get(key, only) != only:
            problems.append(
                Problem(f"{key} is {metadata[key]}", where, "compile for a single device")
            )
    if metadata.get("kv_state_kind", "kv_cache") != "kv_cache":
        kind = metadata["kv_state_kind"]
        problems.append(Problem(f"the model keeps a state of kind {kind!r}", where, _ATTENTION))
    if metadata.get("model_task", "chat") != "chat" or metadata.get("disaggregation"):
        problems.append(Problem("the library is not one for text generation", where, _ATTENTION))
    if metadata.get("seqlen_padding_factor", 1) != 1:
        problems.append(Problem("the library wants padded sequences", where, recompile))
    problems.extend(_architecture_problems(config, metadata, where, recompile))
    problems.extend(_weight_problems(built, metadata, where))
    raise_all(problems)


_ATTENTION = "only attention models with a paged KV cache can be run"


def _architecture_problems(
    config: Mapping[str, Any], metadata: Mapping[str, Any], where: str, fix: str
) -> list[Problem]:
    """Differences in what is computed: what the library records of it, against the config."""
    model = config.get("model_config") or {}
    recorded = metadata.get("architecture")
    if recorded is None:  # mlc_llm records the shape of the KV cache only
        recorded = metadata.get("kv_cache") or {}
        ours = {key: model.get(key) for key in recorded}
        ours = {key: recorded[key] if value is None else value for key, value in ours.items()}
    else:
        try:
            ours = computed_settings(described_model(config))
        except UserError as error:
            return list(error.problems)
    return [
        Problem(
            f"compiled for {key} = {recorded.get(key)!r}, but {CONFIG} says {ours.get(key)!r}",
            where,
            fix,
        )
        for key in sorted({*ours, *recorded})
        if ours.get(key) != recorded.get(key)
    ]


def described_model(config: Mapping[str, Any]) -> ModelConfig:
    """The model that an mlc-chat-config.json describes. Raises UserError for one that mlcawq does
    not know.
    """
    model = config.get("model_config") or {}
    filled = {
        "model_type": config.get("model_type"),
        "rope_theta": model.get("position_embedding_base"),
        "max_position_embeddings": config.get("context_window_size"),
    }
    return parse_config({**filled, **model}, f"{CONFIG}: model_config")


def _weight_problems(
    built: BuiltFolder, metadata: Mapping[str, Any], where: str, most: int = 8
) -> list[Problem]:
    records = {t.name: t for shard in built.shards for t in shard.tensors}
    sizes = {**(built.config.get("model_config") or {}), **built.config}
    found: list[str] = []
    for param in metadata.get("params", ()):
        record = records.get(param["name"])
        shape = tuple(int(sizes.get(s, -1)) if isinstance(s, str) else s for s in param["shape"])
        if record is None:
            found.append(f"{param['name']}: not among the weights")
        elif record.shape != shape or record.dtype != param["dtype"]:
            found.append(
                f"{param['name']}: the library wants {param['dtype']} {list(shape)}, "
                f"the weights are {record.dtype} {list(record.shape)}"
            )
    if not metadata.get("params"):
        found.append("the library names no parameters")
    if not found:
        return []
    more = f"\n    … and {len(found) - most} more" if len(found) > most else ""
    return [
        Problem(
            "the library does not fit the weights:\n    " + "\n    ".join(found[:most]) + more,
            where,
            f"run `mlcawq convert-weight` and `mlcawq compile` for {built.path} again",
        )
    ]


def _not_a_built_folder(folder: Path) -> Problem:
    if (folder / "config.json").is_file():
        return Problem(
            "this is a Hugging Face checkpoint, not a built model",
            str(folder),
            f"run `mlcawq build {folder} -o OUT` and chat with OUT",
        )
    return Problem(f"{CONFIG} is missing", str(folder), "give the output folder of `mlcawq build`")


def _read_json(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(Problem(f"not readable as JSON ({error})", str(path), "build it again"))
        return None
    if not isinstance(data, dict):
        problems.append(Problem("not a JSON object", str(path), "build it again"))
        return None
    return data


def _read_conversation(
    folder: Path, config: Mapping[str, Any], problems: list[Problem]
) -> Conversation:
    template = config.get("conv_template")
    plain = Conversation(name="LM", roles={"user": "", "assistant": ""}, seps=[""])
    if template is None:
        return plain
    try:
        return Conversation.from_dict(template, f"{folder / CONFIG}: conv_template")
    except UserError as error:
        problems.extend(error.problems)
        return plain


def _check_config(folder: Path, config: Mapping[str, Any], problems: list[Problem]) -> None:
    where = str(folder / CONFIG)
    if not isinstance(config.get("model_config", {}), dict):
        problems.append(
            Problem("model_config is no object", where, "run `mlcawq gen-config` again")
        )
    for key in ("model_type", "quantization"):
        if config and not isinstance(config.get(key), str):
            problems.append(Problem(f"{key} is missing", where, "run `mlcawq gen-config` again"))
    for key in ("vocab_size", "context_window_size"):
        value = config.get(key)
        if config and (type(value) is not int or value <= 0):
            problems.append(
                Problem(f"{key} is {value!r}", where, "it must be a positive whole number")
            )


def _read_shards(folder: Path, problems: list[Problem]) -> tuple[Shard, ...]:
    index = next((folder / name for name in TENSOR_CACHE if (folder / name).is_file()), None)
    if index is None:
        problems.append(
            Problem(
                f"the weights are missing ({TENSOR_CACHE[0]})",
                str(folder),
                f"run `mlcawq convert-weight CHECKPOINT -o {folder}`",
            )
        )
        return ()
    data = _read_json(index, problems)
    if data is None:
        return ()
    fix = f"copy the file again, or run `mlcawq convert-weight CHECKPOINT -o {folder}`"
    shards = []
    try:
        for entry in data["records"]:
            shard = Shard(
                path=folder / entry["dataPath"],
                nbytes=int(entry["nbytes"]),
                md5=entry.get("md5sum"),
                tensors=tuple(
                    TensorRecord(
                        name=r["name"],
                        shape=tuple(int(s) for s in r["shape"]),
                        dtype=r["dtype"],
                        format=r.get("format", "raw"),
                        nbytes=int(r["nbytes"]),
                        offset=int(r["byteOffset"]),
                    )
                    for r in entry["records"]
                ),
            )
            shards.append(shard)
            if not shard.path.is_file():
                problems.append(Problem("missing", str(shard.path), fix))
            elif shard.path.stat().st_size != shard.nbytes:
                size = shard.path.stat().st_size
                problems.append(
                    Problem(f"{size} bytes long instead of {shard.nbytes}", str(shard.path), fix)
                )
            for t in shard.tensors:
                if t.offset < 0 or t.offset + t.nbytes > shard.nbytes:
                    what = f"{t.name} lies outside of {shard.path.name}"
                    problems.append(Problem(what, str(index), fix))
                if t.nbytes != _bytes_of(t):
                    what = f"{t.name} is {t.dtype} {list(t.shape)}, but has {t.nbytes} bytes"
                    problems.append(Problem(what, str(index), fix))
                if t.format not in ("raw", "f32-to-bf16"):
                    problems.append(Problem(f"{t.name} has format {t.format!r}", str(index), fix))
    except (KeyError, TypeError, ValueError) as error:
        problems.append(Problem(f"not an index of tensors ({error!r})", str(index), fix))
    return tuple(shards)


def _bytes_of(tensor: TensorRecord) -> int:
    """Bytes of a tensor on disk; -1 for a type that is not known."""
    bits = re.fullmatch(r"(?:u?int|b?float)(8|16|32|64)", tensor.dtype)
    width = int(bits[1]) // 8 if bits else -1
    if tensor.format == "f32-to-bf16" and tensor.dtype == "float32":
        width = 2
    return prod(tensor.shape) * width


def _find_libraries(folder: Path, library: Path | None, problems: list[Problem]) -> dict[str, Path]:
    if library is not None and not library.is_file():
        what = "the library is a folder" if library.is_dir() else "the library does not exist"
        problems.append(Problem(what, str(library), "give the path of the compiled file"))
        return {}
    files = [library] if library is not None else sorted(folder.iterdir())
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix in _SUFFIXES:
            kind = file.stem.replace("_", "-").rsplit("-", 1)[-1].lower()
            kind = DEVICE_ALIASES.get(kind, kind)
            if kind in DEVICES:
                found[kind] = file
                if is_cut_short(file):
                    what = "the library is cut short: an incomplete copy"
                    problems.append(Problem(what, str(file), "copy it again, or compile it again"))
    if not found:
        if library is not None:
            problems.append(
                Problem(
                    "the library's name does not say its device",
                    str(library),
                    "name it as in model-cuda.so or lib-cpu.so",
                )
            )
        else:
            problems.append(
                Problem(
                    "no compiled library (lib-<target>.so) in the folder",
                    str(folder),
                    f"run `mlcawq compile {folder} --target cpu`",
                )
            )
    return found

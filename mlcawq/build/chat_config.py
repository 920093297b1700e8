"""mlc-chat-config.json and what it says of the model, in both directions.

The file is MLC's: its keys, and under "model_config" the fields of MLC's config class for the
architecture. MLC keeps unknown keys there and ignores them, so config.json's own keys stand beside
MLC's: the library can be compiled from this file alone, and nothing of the architecture
(rope scaling, biases) is lost on the way.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import AwqConfig, ModelConfig, load_json, parse_config
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.graph.roundings import EXACT, Roundings
from mlcawq.graph.settings import (
    CompileSettings,
    quantization_named,
)
from mlcawq.graph.tables import PLAIN, Tables, choose_tables
from tir_kernels.layouts import AUTOAWQ, LAYOUTS

CONFIG_NAME = "mlc-chat-config.json"
CONFIG_VERSION = "0.1.0"
ATTENTION_SINK_SIZE = 4

# Keys of config.json that say nothing about the computation, or that make mlc_llm refuse the file
# (it reads quantization_config as its fp8 format).
DROPPED_KEYS = (
    "_name_or_path",
    "auto_map",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True)
class ChatConfig:
    """The part of mlc-chat-config.json that decides how a library is compiled and driven.

    model: the architecture; `model.quantization` is set for AWQ names.
    quantization: MLC's name, one of graph.settings.QUANTIZATIONS.
    weight_layout: how the quantized weights are stored ("autoawq", which a file without it means,
        "n16k64" or "n16k8"), None for unquantized ones.
    tables: how the output head and the embedding are stored.
    roundings: what the library rounds beside the weights.
    sizes: what the library is compiled for.
    raw: the file as it was read.
    """

    model: ModelConfig
    quantization: str
    weight_layout: str | None
    tables: Tables
    roundings: Roundings
    sizes: CompileSettings
    raw: dict[str, Any]


def quantization_of(name: str, awq: object = None) -> AwqConfig | None:
    """The AWQ settings that a quantization name stands for; None for unquantized names.

    awq: the file's own "awq" object, where it has one; stock MLC folders do not.
    Raises UserError for a name that this version cannot build.
    """
    group_size = quantization_named(name).group_size
    if group_size is None:
        return None
    given = awq if isinstance(awq, dict) else {}
    return AwqConfig(
        bits=4,
        group_size=group_size,
        zero_point=bool(given.get("zero_point", True)),
        version="gemm",
        modules_to_not_convert=tuple(given.get("modules_to_not_convert") or ()),
    )


def awq_keys(awq: AwqConfig, weight_layout: str | None) -> dict[str, Any]:
    """What the file says of AWQ weights beside the name of the quantization."""
    return {
        "weight_layout": weight_layout or AUTOAWQ,
        "awq": {
            "bits": awq.bits,
            "group_size": awq.group_size,
            "zero_point": awq.zero_point,
            "version": awq.version,
            "modules_to_not_convert": list(awq.modules_to_not_convert),
        },
    }


def mlc_model_config(config: ModelConfig, sizes: CompileSettings) -> dict[str, Any]:
    """The "model_config" object: config.json's keys, and MLC's own for this architecture."""
    out = {key: value for key, value in config.raw.items() if key not in DROPPED_KEYS}
    out.update(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_hidden_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_theta=_whole(config.rope.theta),
        context_window_size=sizes.context_window_size,
        prefill_chunk_size=sizes.prefill_chunk_size,
        tensor_parallel_shards=1,
        max_batch_size=sizes.max_batch_size,
    )
    # transformers 4's form as well, because that is the one that mlc_llm reads.
    scaled = config.rope.rope_type != "default"
    out["rope_scaling"] = (
        {"rope_type": config.rope.rope_type, **config.rope.params} if scaled else None
    )
    if config.model_type == "llama":
        out.update(pipeline_parallel_stages=1, disaggregation=False)
    if config.model_type in ("llama", "mistral"):
        out["position_embedding_base"] = _whole(config.rope.theta)
    if config.model_type == "mistral":
        # The context never outgrows the window (see gen_config), so no rolling cache is wanted.
        # The sink is then without effect, but mlc_llm insists on a valid one.
        out.update(sliding_window_size=-1, attention_sink_size=ATTENTION_SINK_SIZE)
    if config.model_type in ("qwen2", "qwen3"):
        # MLC's field for the type in which a graph is first written down; it converts later.
        out["dtype"] = "float32"
    else:
        out.pop("dtype", None)
    if config.model_type == "qwen3":
        out.update(attention_bias=config.attention_bias, weight_block_size=None)
    return out


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def config_path(path: Path) -> Path:
    """mlc-chat-config.json for a folder or for the file itself. Raises UserError when missing."""
    path = Path(path)
    file = path / CONFIG_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError.one(
            f"no {CONFIG_NAME}",
            str(path),
            "run `mlcawq gen-config CHECKPOINT -o DIR` first, or `mlcawq build` for all steps",
        )
    return file


def planned_layout(folder: Path) -> str | None:
    """The weight layout that a folder's mlc-chat-config.json names, None where it names none."""
    file = folder / CONFIG_NAME
    return load_json(file).get("weight_layout") if file.is_file() else None


def agreed_layout(folder: Path, asked: str | None) -> str | None:
    """The layout to convert to: what is asked for, which a config in `folder` has to name too.

    Raises UserError where it names another one.
    """
    planned = planned_layout(folder)
    if asked is None or planned is None or planned == asked:
        return asked or planned
    raise UserError.one(
        f"weights in the layout {asked} were asked for, but {CONFIG_NAME} there says {planned}",
        str(folder),
        f"leave --weight-layout out, or run gen-config with --weight-layout {asked} first",
    )


def planned_roundings(folder: Path) -> Roundings:
    """What a folder's mlc-chat-config.json says that is rounded beside the weights; nothing where
    there is no such file. Raises UserError for what is not known.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        return EXACT
    problems: list[Problem] = []
    roundings = Roundings.named(load_json(file), str(file), problems)
    raise_all(problems)
    return roundings


def planned_tables(folder: Path) -> Tables | None:
    """How a folder's mlc-chat-config.json says that head and embedding are stored, None where there
    is no such file. Raises UserError for what is not known.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        return None
    problems: list[Problem] = []
    tables = _read_tables(load_json(file), str(file), problems)
    raise_all(problems)
    return tables


def agreed_tables(
    folder: Path, config: ModelConfig, asked: str | None, *, packed: bool, own: bool
) -> Tables:
    """How to store head and embedding: what is asked for (`choose_tables`), which a config in
    `folder` has to say too; where nothing is asked for, what it says.

    Raises UserError where it says something else, and as `choose_tables`.
    """
    planned = planned_tables(folder)
    if planned is not None and asked is None:
        return planned
    tables = choose_tables(config, asked, packed=packed, own=own, device=None)
    if planned is None or planned == tables:
        return tables
    said = ", ".join(planned.names().values()) or "float16"
    raise UserError.one(
        f"a head in {asked} was asked for, but {CONFIG_NAME} there says {said}",
        str(folder),
        f"leave --head out, or run gen-config with --head {asked} first",
    )


def _read_tables(raw: dict[str, Any], where: str, problems: list[Problem]) -> Tables:
    try:
        return Tables.named(raw)
    except ValueError as error:
        fix = "convert the weights again with this version"
        problems.append(Problem(f"head or embedding: {error}", where, fix))
        return PLAIN


def read_chat_config(path: Path) -> ChatConfig:
    """Read a folder's mlc-chat-config.json, written by us or by mlc_llm.

    Raises UserError naming every value that is missing, wrong, or not supported.
    """
    file = config_path(path)
    raw = load_json(file)
    where = str(file)
    model = raw.get("model_config")
    if not isinstance(model, dict):
        raise UserError.one("model_config is missing", where, "write the file with gen-config")
    model = {"model_type": raw.get("model_type"), **model}
    # A stock file holds MLC's name of the rotary base, and no maximum beside its context.
    model.setdefault("rope_theta", model.get("position_embedding_base") or None)
    problems: list[Problem] = []
    sizes = {}
    for key in ("context_window_size", "prefill_chunk_size", "max_batch_size"):
        value = raw.get(key, model.get(key))
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            problems.append(Problem(f"{key} must be a positive integer, found {value!r}", where))
            value = 1
        sizes[key] = value
    model.setdefault("max_position_embeddings", sizes["context_window_size"])
    name = raw.get("quantization")
    quantization = None
    if not isinstance(name, str):
        problems.append(Problem(f"quantization must be a name, found {name!r}", where))
        name = ""
    else:
        try:
            quantization = quantization_of(name, raw.get("awq"))
        except UserError as error:
            problems.extend(dataclasses.replace(p, where=where) for p in error.problems)
    layout = raw.get("weight_layout") or AUTOAWQ
    if quantization and layout not in LAYOUTS:
        problems.append(
            Problem(
                f"weight_layout {layout!r} is not supported (supported: {', '.join(LAYOUTS)})",
                where,
                "convert the weights again with this version",
            )
        )
    tables = _read_tables(raw, where, problems)
    roundings = Roundings.named(raw, where, problems)
    if raw.get("tensor_parallel_shards", 1) != 1:
        problems.append(Problem("tensor_parallel_shards above 1 is not supported", where))
    try:
        parsed = parse_config(model, f"{where}: model_config")
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    raise_all(problems)
    return ChatConfig(
        model=dataclasses.replace(parsed, quantization=quantization),
        quantization=name,
        weight_layout=layout if quantization else None,
        tables=tables,
        roundings=roundings,
        sizes=CompileSettings(**sizes),
        raw=raw,
    )


def library_name(target: str) -> str:
    """File name of the library inside a model folder, for a target kind ("cpu" -> lib-cpu.so)."""
    return f"lib-{re.sub(r'[^a-z0-9]+', '-', target.lower()).strip('-')}.so"

"""Does the built library compute what the checkpoint computes? Logits against PyTorch in float32.

The reference is the checkpoint itself, its AWQ weights dequantized, run block by block; where the
build has rounded its head, with the rounded one (`rounded_reference`). The library is driven as a
chat drives it: prefill on an empty and on a filled cache, decode, several sequences at once.
Above FULL_LIMIT parameters the reference would take too long, and only a few layers are compared,
see `verify_sampled`.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlcawq.build.chat_config import ChatConfig, library_name, read_chat_config
from mlcawq.build.compare_logits import LIMITS, Comparison, compare_logits
from mlcawq.build.rounded_reference import TableLoss, compute_reference
from mlcawq.checkpoint.config import ModelConfig
from mlcawq.engine.artifact import TOKENIZER, BuiltFolder, Shard, read_folder
from mlcawq.engine.conversation import Conversation
from mlcawq.engine.devices import Missing, find_device
from mlcawq.engine.processor import this_processor
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.engine.tokenizer import ModelTokenizer
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import expected_tensors
from mlcawq.graph.roundings import EXACT
from mlcawq.graph.settings import CompileSettings, quantization_named

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target

FULL_LIMIT = 2_000_000_000  # parameters
Mode = Literal["full", "sampled", "off"]
Progress = Callable[[str], None]
CompilePart = Callable[[ModelConfig, Path, CompileSettings], None]

_TEXT = (
    "Rivers carry water from the hills to the sea. In 1869 there were 63 known elements; "
    "today there are 118.\n\ndef area(r):\n    return 3.14159 * r ** 2\n"
)
_DIALOGUE = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And how do you say 'good morning' there?"},
)
_RANDOM_TOKENS = 144
_LONGEST = 192  # tokens of a prompt
_DECODED = 12  # tokens of a prompt that are decoded one by one
_PIECES = (1, 7, 64, 33)  # sizes of the pieces in which a prompt is prefilled, in turn
_SAMPLED_LAYERS = 3


@dataclass(frozen=True)
class Verification:
    """mode: "full", or "sampled" with the indices of the layers that were compared.

    limit: the relative error that was tolerated; comparisons: all that was compared. rounding: what
    the build's own rounding of head and embedding changes, which is not the library's error; None
    where it rounds nothing.
    """

    mode: Mode
    limit: float
    comparisons: tuple[Comparison, ...]
    layers: tuple[int, ...] = ()
    rounding: TableLoss | None = None

    @property
    def worst(self) -> float:
        """The largest relative error of any comparison."""
        return max(comparison.relative_error for comparison in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "worst_relative_error": self.worst}


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the unquantized model, a tied head counted once."""
    return sum(prod(shape) for shape in expected_tensors(config).values())


def choose_mode(config: ModelConfig, asked: bool | None) -> Mode:
    """asked: --verify (True), --no-verify (False), neither (None: by size)."""
    if asked is None:
        return "full" if num_parameters(config) < FULL_LIMIT else "sampled"
    return "full" if asked else "off"


def missing_device(target: Target, quantization: str) -> str:
    """Why what is compiled for `target` cannot be run here; empty when it can."""
    from mlcawq.build.cpu_target import features_of
    from mlcawq.build.targets import target_device, target_record

    kind = target_device(target)
    if kind == "cpu":
        lacking = this_processor().lacks(features_of(target))
        return f"this processor does not run it (it lacks {', '.join(lacking)})" if lacking else ""
    device = find_device(kind)
    if isinstance(device, Missing):
        return f"no {kind} device here ({device.reason})"
    refusal = device.refusal(target_record(target), quantization)
    return f"no {kind} device here that runs it ({refusal})" if refusal else ""


def verify_full(folder: Path, checkpoint: Path, device: str = "cpu") -> Verification:
    """Compare a built folder's library for `device` with the checkpoint on whole prompts.

    Raises UserError naming prompt, way of computing and position of every disagreement.
    """
    config = read_chat_config(folder)
    built = read_folder(folder)
    prompts = make_prompts(folder, built.conversation, config)
    reference = compute_reference(
        checkpoint, built, config.model, config.tables, list(prompts.values())
    )
    runtime = ModelRuntime(built, device, max_total_tokens=4 * _LONGEST)
    comparisons = _compare_all(runtime, prompts, reference.logits, _limit(config))
    result = Verification("full", _limit(config), tuple(comparisons), rounding=reference.loss)
    _raise_faults(result, folder)
    return result


def verify_sampled(
    folder: Path,
    checkpoint: Path,
    target: Target,
    progress: Progress | None = None,
    compile_part: CompilePart | None = None,
) -> Verification:
    """Compare a model made of a few of the layers, and see that the whole library runs.

    First, middle and last layer, with embedding, norm and head, are a small model of the same
    shapes: it is compiled with the same kernels and run on the converted weights of these layers,
    against the checkpoint's same layers in PyTorch. The full library then has to load, fit its
    weights, and give finite logits; the wiring of its other layers is not compared.
    compile_part: (model, library, sizes), what compiled the folder's library; by default ourselves.
    Raises UserError as `verify_full`.
    """
    from mlcawq.build.targets import target_device

    say = progress or (lambda text: None)
    config = read_chat_config(folder)
    built = read_folder(folder)
    layers = sample_layers(config.model.num_hidden_layers)
    prompts = make_prompts(folder, built.conversation, config)
    limit, device = _limit(config), target_device(target)
    with tempfile.TemporaryDirectory(prefix="mlcawq-verify-") as scratch:
        say(f"compiling layers {', '.join(map(str, layers))} on their own")
        part = truncated(config.model, layers)
        library = Path(scratch) / library_name(device)
        sizes = CompileSettings(
            min(config.sizes.context_window_size, 2 * _LONGEST),
            min(config.sizes.prefill_chunk_size, _LONGEST),
            min(config.sizes.max_batch_size, 2),
        )
        if compile_part is None:
            _compile(part, library, target, config, sizes)
        else:
            compile_part(part, library, sizes)
        say("comparing them with PyTorch")
        reference = compute_reference(
            checkpoint, built, config.model, config.tables, list(prompts.values()), layers
        )
        small = sampled_folder(built, part, layers, {device: library})
        runtime = ModelRuntime(small, device, max_total_tokens=4 * _LONGEST)
        comparisons = _compare_all(runtime, prompts, reference.logits, limit)
        del runtime
    result = Verification("sampled", limit, tuple(comparisons), layers, reference.loss)
    _raise_faults(result, folder)
    say("running the whole library")
    _run_whole(built, device, prompts)
    return result


def _compile(
    part: ModelConfig, library: Path, target: Target, config: ChatConfig, sizes: CompileSettings
) -> None:
    from mlcawq.build.compile import compile_model

    compile_model(
        part,
        library,
        target,
        config.quantization,
        **asdict(sizes),
        weight_layout=config.weight_layout,
        tables=config.tables,
        roundings=config.roundings,
    )


def sample_layers(count: int) -> tuple[int, ...]:
    """First, middle and last, as far as there are so many."""
    picked = np.linspace(0, count - 1, min(count, _SAMPLED_LAYERS)).round().astype(int)
    return tuple(sorted({int(i) for i in picked}))


def truncated(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The model that consists of `layers` only, renumbered from 0."""
    quantization = config.quantization
    if quantization is not None:
        # Names of single layers ("model.layers.7.mlp") have to follow the new numbers.
        new = {old: i for i, old in enumerate(layers)}
        kept = []
        for name in quantization.modules_to_not_convert:
            match = re.search(r"layers\.(\d+)\.", name + ".")
            if match is None:
                kept.append(name)
            elif int(match[1]) in new:
                kept.append(name.replace(f"layers.{match[1]}", f"layers.{new[int(match[1])]}", 1))
        quantization = dataclasses.replace(quantization, modules_to_not_convert=tuple(kept))
    types = tuple(config.layer_types[i] for i in layers)
    return dataclasses.replace(
        config,
        num_hidden_layers=len(layers),
        layer_types=types,
        sliding_window=config.sliding_window if "sliding_attention" in types else None,
        quantization=quantization,
    )


def sampled_folder(
    built: BuiltFolder, part: ModelConfig, layers: Sequence[int], libraries: dict[str, Path]
) -> BuiltFolder:
    """`built` reduced to the weights of `layers`, renumbered, with the libraries of `part`."""
    new = {old: i for i, old in enumerate(layers)}

    def renamed(name: str) -> str | None:
        match = re.match(r"(.*\blayers\.)(\d+)(\..*)", name)
        if match is None:
            return name
        number = new.get(int(match[2]))
        return None if number is None else f"{match[1]}{number}{match[3]}"

    shards = []
    for shard in built.shards:
        records = [
            dataclasses.replace(record, name=name)
            for record in shard.tensors
            if (name := renamed(record.name)) is not None
        ]
        if records:
            shards.append(Shard(shard.path, shard.nbytes, shard.md5, tuple(records)))
    model = {
        **built.config.get("model_config", {}),
        "num_hidden_layers": len(layers),
        "layer_types": list(part.layer_types),
    }
    config = {**built.config, "model_config": model, "context_window_size": -1}
    return dataclasses.replace(built, config=config, shards=tuple(shards), libraries=libraries)


def make_prompts(
    folder: Path, conversation: Conversation, config: ChatConfig
) -> dict[str, list[int]]:
    """Token ids to compare on: a text, a dialogue through the template, and random tokens."""
    tokenizer = ModelTokenizer(folder / TOKENIZER, conversation)
    vocabulary = min(tokenizer.size, config.model.vocab_size)
    prompts = {"text": tokenizer.encode_plain(_TEXT)}
    if not conversation.is_plain:
        prompts["dialogue"] = tokenizer.encode_chat(_DIALOGUE)
    random = np.random.default_rng(0).integers(0, vocabulary, _RANDOM_TOKENS)
    prompts["random tokens"] = random.tolist()
    most = min(_LONGEST, config.sizes.context_window_size)
    return {name: ids[:most] for name, ids in prompts.items() if ids}


def _compare_all(
    runtime: ModelRuntime,
    prompts: dict[str, list[int]],
    references: Sequence[np.ndarray],
    limit: float,
) -> list[Comparison]:
    out = []
    for (name, ids), expected in zip(prompts.items(), references, strict=True):
        runtime.clear()
        runtime.add_sequence(0)
        logits = np.concatenate(
            [runtime.score(0, piece) for piece in _pieces(ids, runtime.score_chunk)]
        )
        out.append(compare_logits(logits, expected, limit, name, "prefill in pieces"))
        out.append(_decoded(runtime, ids, expected, limit, name))
    if len(prompts) > 1 and runtime.max_batch > 1:
        out += _batched(runtime, prompts, references, limit)
    runtime.clear()
    return out


def _decoded(
    runtime: ModelRuntime, ids: list[int], expected: np.ndarray, limit: float, name: str
) -> Comparison:
    """Prefill as long as the chunk allows, then token by token."""
    start = max(1, len(ids) - _DECODED)
    runtime.clear()
    runtime.add_sequence(0)
    chunk = runtime.prefill_chunk_size
    for at in range(0, start, chunk):
        logits = [runtime.prefill([(0, ids[at : min(at + chunk, start)])])]
    logits += [runtime.decode([0], [token]) for token in ids[start:]]
    got = np.concatenate(logits)
    return compare_logits(got, expected[start - 1 :], limit, name, "prefill and decode", start - 1)


def _batched(
    runtime: ModelRuntime,
    prompts: dict[str, list[int]],
    references: Sequence[np.ndarray],
    limit: float,
) -> list[Comparison]:
    """Two sequences at once: one prefill of both, then both decoded together."""
    names = list(prompts)[:2]
    pair = [prompts[name] for name in names]
    steps = min(_DECODED, *(len(ids) - 1 for ids in pair))
    starts = [min(len(ids) - steps, runtime.prefill_chunk_size // 2) for ids in pair]
    if steps < 1 or min(starts) < 1:
        return []
    runtime.clear()
    runtime.add_sequence(0)
    runtime.add_sequence(1)
    logits = [runtime.prefill([(i, pair[i][: starts[i]]) for i in (0, 1)])]
    for step in range(steps):
        tokens = [pair[i][starts[i] + step] for i in (0, 1)]
        logits.append(runtime.decode([0, 1], tokens))
    return [
        compare_logits(
            np.stack([both[i] for both in logits]),
            references[i][starts[i] - 1 : starts[i] + steps],
            limit,
            names[i],
            "two sequences at once",
            starts[i] - 1,
        )
        for i in (0, 1)
    ]


def _pieces(ids: list[int], most: int) -> list[list[int]]:
    out: list[list[int]] = []
    at = 0
    while at < len(ids):
        size = min(_PIECES[len(out) % len(_PIECES)], most)
        out.append(ids[at : at + size])
        at += size
    return out


def _run_whole(built: BuiltFolder, device: str, prompts: dict[str, list[int]]) -> None:
    runtime = ModelRuntime(built, device, max_batch=1, max_total_tokens=2 * _LONGEST)
    ids = next(iter(prompts.values()))[: runtime.prefill_chunk_size]
    runtime.add_sequence(0)
    for logits in (runtime.prefill([(0, ids)]), runtime.decode([0], [ids[-1]])):
        if not np.isfinite(logits).all():
            raise UserError.one(
                "the library computes logits that are not finite", str(runtime.library), _FIX
            )


def _limit(config: ChatConfig) -> float:
    if config.roundings != EXACT:
        return LIMITS["int8"]
    return LIMITS[quantization_named(config.quantization).dtype]


_FIX = (
    "the compiler or this machine is at fault, not the checkpoint: try another --target (for a CPU "
    "cpu:x86-64-v3), and report it; --no-verify builds all the same"
)


def _raise_faults(result: Verification, folder: Path) -> None:
    problems = [
        Problem(
            f"the library's logits are not the checkpoint's: {'; '.join(comparison.faults)}",
            f"{comparison.prompt}, {comparison.path}",
        )
        for comparison in result.comparisons
        if comparison.faults
    ]
    if problems:
        problems[-1] = dataclasses.replace(problems[-1], fix=_FIX)
    raise_all(problems)

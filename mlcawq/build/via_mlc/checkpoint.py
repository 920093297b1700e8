"""What mlc_llm can make of a checkpoint: its family, its quantization, and what it would get wrong.

mlc_llm knows more families than we do. Of those only config.json's own words are known here, and
what the installed mlc_llm says of itself.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcawq.build.via_mlc.interpreter import MlcInterpreter
from mlcawq.build.weight_plan import plan_parameters
from mlcawq.checkpoint.config import (
    AwqConfig,
    ModelConfig,
    load_json,
    read_config,
    read_quantization,
)
from mlcawq.checkpoint.tensors import INDEX, TensorReader
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import FAMILIES
from mlcawq.graph.settings import QUANTIZATIONS, infer_quantization, quantization_named

STOCK_AWQ = "q4f16_autoawq"  # the one that mlc_llm has of itself
_PLUGIN = "leave --no-plugin out: the plug-in does"
_HEADS = ("lm_head", "embed_out", "output")  # linears that mlc_llm never quantizes with AWQ


@dataclass(frozen=True)
class MlcCheckpoint:
    """raw: config.json. config: the same, read; None for families that we have no table of."""

    folder: Path
    raw: dict[str, Any]
    model_type: str
    awq: AwqConfig | None
    config: ModelConfig | None

    @property
    def weights(self) -> Path:
        """The file that names all tensors: the index, or the only file of weights."""
        files = sorted(self.folder.glob("*.safetensors"))
        index = self.folder / INDEX
        return files[0] if len(files) == 1 and not index.is_file() else index

    @property
    def where(self) -> str:
        return str(self.folder / "config.json")


def describe(folder: Path) -> MlcCheckpoint:
    """Raises UserError where config.json is missing or wrong."""
    raw = load_json(folder / "config.json")
    where = str(folder / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UserError.one(f"model_type must be a name, found {model_type!r}", where)
    if model_type in FAMILIES:
        config = read_config(folder)
        return MlcCheckpoint(folder, raw, model_type, config.quantization, config)
    return MlcCheckpoint(folder, raw, model_type, read_quantization(raw, where), None)


def choose_quantization(
    checkpoint: MlcCheckpoint, asked: str | None, interpreter: MlcInterpreter, *, plugin: bool
) -> str:
    """The name for mlc_llm's --quantization: `asked`, or what the checkpoint is.

    Raises UserError for a name that does not fit the checkpoint, or that nobody there knows.
    """
    known = interpreter.quantizations
    if checkpoint.awq is not None:
        name = _awq_name(checkpoint.awq, asked)
        if not plugin and name not in (known or {STOCK_AWQ}):
            raise UserError.one(
                f"mlc_llm of itself has no quantization {name}, only {STOCK_AWQ} (group size 128)",
                "--no-plugin",
                _PLUGIN,
            )
        return name
    if asked is None:
        if checkpoint.config is not None:
            return infer_quantization(checkpoint.config).name
        return "q0f16"
    if asked in QUANTIZATIONS and quantization_named(asked).group_size is not None:
        raise UserError.one(
            f"quantization {asked} was asked for, but the checkpoint is not quantized",
            "--quantization",
            "`mlcawq quantize` makes an AWQ checkpoint of it",
        )
    names = {*(known or ()), *QUANTIZATIONS}
    if known is not None and asked not in names:
        near = difflib.get_close_matches(asked, sorted(names), 1)
        raise UserError.one(
            f"quantization {asked!r} is not known to mlc_llm {interpreter.mlc_llm}",
            "--quantization",
            (f"did you mean {near[0]}? " if near else "") + f"It knows {', '.join(sorted(names))}",
        )
    return asked


def _awq_name(awq: AwqConfig, asked: str | None) -> str:
    fitting = [n for n in QUANTIZATIONS if quantization_named(n).group_size == awq.group_size]
    if asked is None:
        return fitting[0]
    if asked not in fitting:
        raise UserError.one(
            f"quantization {asked} was asked for, but the checkpoint is AWQ with group size "
            f"{awq.group_size}",
            "--quantization",
            f"leave it out, or use {' or '.join(fitting)}",
        )
    return asked


def check_family(
    checkpoint: MlcCheckpoint, interpreter: MlcInterpreter, *, plugin: bool, renamed: bool = False
) -> None:
    """Raises UserError for a model that the installed mlc_llm does not have, or, without the
    plug-in, does not get right.

    renamed: the user has named another model type in the steps' own arguments.
    """
    problems = []
    known = interpreter.models
    if known is not None and checkpoint.model_type not in known and not renamed:
        near = difflib.get_close_matches(checkpoint.model_type, sorted(known), 1)
        problems.append(
            Problem(
                f"mlc_llm {interpreter.mlc_llm} does not know model_type "
                f"{checkpoint.model_type!r} (it knows {', '.join(sorted(known))})",
                checkpoint.where,
                "use a newer mlc_llm"
                + (f", or --gen-config-args '--model-type {near[0]}'" if near else ""),
            )
        )
    if not plugin:
        problems += _stock_problems(checkpoint, interpreter)
    raise_all(problems)


def _stock_problems(checkpoint: MlcCheckpoint, interpreter: MlcInterpreter) -> list[Problem]:
    """What mlc_llm of itself would compute wrong in silence, or fail at in the middle."""
    found = _rope_problems(checkpoint)
    awq = checkpoint.awq
    if awq is None:
        return found

    def refuse(what: str) -> None:
        found.append(Problem(what, "--no-plugin", _PLUGIN))

    able = interpreter.awq_models
    if able is not None and checkpoint.model_type not in able:
        refuse(
            f"mlc_llm cannot load AWQ weights of {checkpoint.model_type} (it can of "
            f"{', '.join(sorted(able))})"
        )
    if not awq.zero_point:
        refuse("mlc_llm loads AWQ weights with zero points only, and this checkpoint has none")
    kept = [n for n in awq.modules_to_not_convert if n.rpartition(".")[2] not in _HEADS]
    if kept:
        refuse(
            f"mlc_llm takes every linear of a block for quantized, and {', '.join(kept)} "
            f"{'is' if len(kept) == 1 else 'are'} not (modules_to_not_convert)"
        )
    return found


def _rope_problems(checkpoint: MlcCheckpoint) -> list[Problem]:
    """transformers 5 moved rope_theta into rope_parameters, where mlc_llm does not look: it takes
    10000, and no scaling.
    """
    raw = checkpoint.raw
    given = raw.get("rope_parameters")
    if not isinstance(given, dict):
        return []
    scaled = given.get("rope_type", "default") != "default" and not raw.get("rope_scaling")
    if "rope_theta" in raw and not scaled:
        return []
    wanted = [] if "rope_theta" in raw else [f'"rope_theta": {given.get("rope_theta", 10000.0)}']
    wanted += ['"rope_scaling" with the rest of rope_parameters'] if scaled else []
    return [
        Problem(
            "config.json is in the form of transformers 5 (rope_parameters), which mlc_llm does "
            "not read: it would compute with other rotary frequencies",
            checkpoint.where,
            f"{_PLUGIN}; or add {' and '.join(wanted)} to config.json",
        )
    ]


def check_sources(checkpoint: MlcCheckpoint) -> None:
    """Raises UserError for files of weights that are broken or that mlc_llm does not find."""
    TensorReader(checkpoint.folder)
    if not checkpoint.weights.is_file():
        raise UserError.one(
            "there are several files of weights and no model.safetensors.index.json",
            str(checkpoint.folder),
            "download the checkpoint again",
        )


def weight_bytes(checkpoint: MlcCheckpoint, quantization: str) -> int:
    """Bytes of the converted parameters: exact for what we can build ourselves, else estimated
    from the size of the checkpoint's files.

    Raises UserError where tensors are missing or of a wrong shape.
    """
    if checkpoint.config is not None and quantization in QUANTIZATIONS:
        kind = infer_quantization(checkpoint.config, quantization)
        plan = plan_parameters(checkpoint.config, kind, TensorReader(checkpoint.folder))
        return sum(parameter.nbytes for parameter in plan)
    total = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
    bits = re.match(r"q([1-8])", quantization)
    if checkpoint.awq is not None or bits is None:
        return total
    # Scales take up to half a bit a weight; the checkpoint holds two bytes a weight.
    return int(total * (int(bits[1]) + 0.5) / 16)

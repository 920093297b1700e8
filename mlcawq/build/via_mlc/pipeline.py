"""A build whose three steps mlc_llm takes: put in place as one, verified.

The commands that run are the ones that `--dry-run` prints, with another folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mlcawq.build.chat_config import CONFIG_NAME
from mlcawq.build.pipeline import AWAY, BuildResult, Reporter
from mlcawq.build.verify import Verification, num_parameters, verify_full, verify_sampled
from mlcawq.build.via_mlc import commands
from mlcawq.build.via_mlc.plan import MlcRequest, Plan, check
from mlcawq.build.via_mlc.run import run_step
from mlcawq.checkpoint.config import ModelConfig, load_json
from mlcawq.checkpoint.tensors import INDEX
from mlcawq.checkpoint.writing import staged_folder, write_json
from mlcawq.errors import UserError
from mlcawq.graph.settings import QUANTIZATIONS, CompileSettings, quantization_named
from tir_kernels.layouts import AUTOAWQ

TENSOR_CACHES = ("tensor-cache.json", "ndarray-cache.json")  # the second in older releases


def build(
    checkpoint: Path,
    out: Path,
    request: MlcRequest,
    reporter: Reporter | None = None,
    output: IO[bytes] | None = None,
) -> BuildResult:
    """Checkpoint folder -> model folder `out`, whole and verified, or not at all.

    output: where mlc_llm's own output goes as it comes, our stderr by default.
    Raises UserError for everything that is wrong beforehand, for a step that fails, and when the
    library's logits are not the checkpoint's.
    """
    reporter = reporter or Reporter()
    checkpoint, out = Path(checkpoint), Path(out)
    plan = check(checkpoint, out, request)
    for note in plan.notes:
        reporter.message(note)
    by_hand, differences = plan.by_hand(out), 0
    with staged_folder(out, overwrite=request.build.overwrite) as stage:
        with plan.template.file() as file, without_litter(checkpoint):
            for step, argv in plan.steps(stage, file).items():
                reporter.stage(f"mlc_llm {step}")
                run_step(argv, by_hand[step], output)
                require_result(step, stage, stage / plan.target.library, by_hand[step])
                if step == "gen_config":
                    differences = _template_differences(plan, stage, reporter)
        verification, unverified = None, plan.unverified or _foreign(stage)
        if unverified and request.build.verify:
            raise UserError.one(f"the library cannot be verified: {unverified}", "--verify", AWAY)
        if not unverified:
            verification = _verify(plan, stage, by_hand["compile"], reporter, output)
        return _result(plan, stage, out, differences, verification, unverified)


@contextmanager
def without_litter(checkpoint: Path | None) -> Iterator[None]:
    """mlc_llm writes an index into the folder of a checkpoint that has none: it is removed."""
    index = checkpoint / INDEX if checkpoint is not None else None
    before = index is None or index.exists()
    try:
        yield
    finally:
        if index is not None and not before:
            index.unlink(missing_ok=True)


def require_result(step: str, folder: Path, library: Path, by_hand: str) -> None:
    """Raise UserError when a step that ended well did not write what it is for."""
    wanted = {
        "gen_config": (folder / CONFIG_NAME,),
        "convert_weight": tuple(folder / name for name in TENSOR_CACHES),
        "compile": (library,),
    }[step]
    if not any(path.is_file() for path in wanted):
        raise UserError.one(
            f"mlc_llm {step} ended without an error and wrote no {wanted[0].name}",
            "",
            f"its output above may say why; to repeat it by hand:\n     {by_hand}",
        )


def _foreign(stage: Path) -> str:
    """Why our engine has no way to run what mlc_llm was told to make; empty where it has."""
    raw = load_json(stage / CONFIG_NAME)
    for key in ("tensor_parallel_shards", "pipeline_parallel_stages"):
        if (raw.get(key) or 1) != 1:
            return f"{key} is {raw[key]}, and mlcawq's engine runs a model on one device"
    if (raw.get("sliding_window_size") or -1) > 0:
        return (
            f"the library keeps a rolling cache of {raw['sliding_window_size']} tokens, which "
            "mlcawq's engine does not have"
        )
    return ""


def _template_differences(plan: Plan, stage: Path, reporter: Reporter) -> int:
    """Dialogues that the folder renders otherwise than the model does. mlc_llm's template of a name
    may render otherwise than ours of that name, which is then told.
    """
    choice = plan.template.choice
    if plan.template.name is not None:
        choice = plan.template.written(plan.checkpoint.folder, stage)
        for line in choice.report() if choice is not None and choice.differences else ():
            reporter.message(line)
    return len(choice.differences) if choice is not None else 0


def _verify(
    plan: Plan, stage: Path, by_hand: str, reporter: Reporter, output: IO[bytes] | None
) -> Verification:
    assert plan.target.target is not None  # or there would be a reason not to verify
    reporter.stage("verification")
    if plan.mode == "full":
        return verify_full(stage, plan.checkpoint.folder, plan.target.kind)

    def compile_part(part: ModelConfig, library: Path, sizes: CompileSettings) -> None:
        """The few layers go through the compiler that the whole library went through."""
        with tempfile.TemporaryDirectory(prefix="mlcawq-part-") as folder:
            write_json(Path(folder) / CONFIG_NAME, part_config(stage, part, sizes))
            extra = plan.extra.compile
            argv = commands.compile_(plan.program, folder, library, plan.target.device, extra=extra)
            run_step(argv, by_hand, output)

    return verify_sampled(
        stage,
        plan.checkpoint.folder,
        plan.target.target,
        lambda text: reporter.stage(f"verification: {text}"),
        compile_part,
    )


def part_config(folder: Path, part: ModelConfig, sizes: CompileSettings) -> dict[str, Any]:
    """`folder`'s mlc-chat-config.json for a model of fewer layers and other sizes."""
    raw = load_json(folder / CONFIG_NAME)
    model = {**raw["model_config"], **asdict(sizes), "num_hidden_layers": part.num_hidden_layers}
    if "layer_types" in model:
        model["layer_types"] = list(part.layer_types)
    if part.quantization is not None and isinstance(raw.get("awq"), dict):
        kept = list(part.quantization.modules_to_not_convert)
        raw["awq"] = {**raw["awq"], "modules_to_not_convert": kept}
    return {**raw, **asdict(sizes), "model_config": model}


def _result(
    plan: Plan,
    stage: Path,
    out: Path,
    differences: int,
    verification: Verification | None,
    unverified: str,
) -> BuildResult:
    raw = load_json(stage / CONFIG_NAME)
    cache = next(stage / name for name in TENSOR_CACHES if (stage / name).is_file())
    metadata = load_json(cache).get("metadata") or {}
    weights = sum(path.stat().st_size for path in stage.glob("params_shard_*.bin"))
    bits = float(metadata.get("BitsPerParam") or 0)
    parameters = round(8 * weights / bits) if bits else 0
    if plan.checkpoint.config is not None:
        parameters = num_parameters(plan.checkpoint.config)
    library = stage / plan.target.library
    packed = plan.quantization in QUANTIZATIONS and quantization_named(plan.quantization).group_size
    conversation = raw.get("conv_template")
    named = conversation.get("name") if isinstance(conversation, dict) else conversation
    return BuildResult(
        folder=out,
        quantization=plan.quantization,
        weight_layout=raw.get("weight_layout", AUTOAWQ) if packed else None,
        parameters=parameters,
        weight_bytes=weights,
        bits_per_parameter=8 * weights / parameters if parameters else bits,
        library=library.name,
        library_bytes=library.stat().st_size,
        sizes=CompileSettings(
            raw["context_window_size"],
            raw["prefill_chunk_size"],
            raw.get("max_batch_size") or raw["model_config"]["max_batch_size"],
        ),
        conv_template=str(named),
        template_differences=differences,
        verification=verification,
        unverified=unverified,
        via=str(plan.program.interpreter),
    )

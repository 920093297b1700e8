"""Runs inside AutoAWQ's own environment (setup_autoawq.sh): one job file in, one result file out.

    python autoawq_runner.py JOB.json

A job is a JSON object; "task" says which function below does it and "result" names the JSON file
to write. Token ids are given as they are, so that AutoAWQ sees exactly the tokens that we see.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from awq import AutoAWQForCausalLM  # noqa: E402
from awq.models import base as awq_base  # noqa: E402
from awq.modules.linear import WQLinear_GEMM  # noqa: E402
from awq.quantize.quantizer import AwqQuantizer  # noqa: E402
from awq.utils.module import get_named_linears  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402


class CpuAwqQuantizer(AwqQuantizer):
    """AutoAWQ's quantizer, made to do on a CPU what it does on a GPU, and timed.

    The scale search restores the weights after every trial from a copy that it makes with
    `.cpu()`. On a GPU that is a copy; on a CPU it is the weights themselves, so every trial is
    measured on what the trials before it left. The copy is made a real one by handing the
    search clones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.block_starts: list[float] = []
        self.block_rss_mib: list[float] = []
        self.packing_seconds = 0.0
        super().__init__(*args, **kwargs)

    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):  # type: ignore[no-untyped-def]
        def cloned_state() -> dict[str, torch.Tensor]:
            state = type(module2inspect).state_dict(module2inspect)
            return {name: tensor.clone() for name, tensor in state.items()}

        module2inspect.state_dict = cloned_state
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
        finally:
            del module2inspect.state_dict

    def _get_input_feat(self, layer, named_linears):  # type: ignore[no-untyped-def]
        # Called once a block, before anything else is done for that block.
        self.block_starts.append(time.perf_counter())
        self.block_rss_mib.append(rss_mib())
        return super()._get_input_feat(layer, named_linears)

    def _apply_quant(self, module, named_linears):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        super()._apply_quant(module, named_linears)
        self.packing_seconds += time.perf_counter() - start


def rss_mib() -> float:
    """Resident memory of this process now, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize job["model"] with AutoAWQ's own search on the windows of job["tokens"].

    With "bits" 4 and "pack" true, job["out"] becomes the folder that AutoAWQ writes; otherwise
    AutoAWQ's rounding is applied to the weights that its search leaves, and the folder holds
    them dequantized (AutoAWQ packs 4 bits only). Without "out" nothing is written.
    """
    windows: list[list[int]] = job["tokens"]
    length = len(windows[0])
    if any(len(window) != length for window in windows):
        raise SystemExit("every calibration window must have the same length")
    pack = bool(job.get("pack", True))
    # low_cpu_mem_usage off: a model this small needs no accelerate hooks, which would slow it.
    model = AutoAWQForCausalLM.from_pretrained(job["model"], low_cpu_mem_usage=False)
    quantizers: list[CpuAwqQuantizer] = []

    def make_quantizer(*args: Any, **kwargs: Any) -> CpuAwqQuantizer:
        quantizers.append(CpuAwqQuantizer(*args, **kwargs))
        return quantizers[0]

    cpu_before, start = time.process_time(), time.perf_counter()
    model.quantize(
        tokenizer=None,
        quant_config={
            "zero_point": True,
            "q_group_size": job["group_size"],
            "w_bit": job["bits"],
            "version": "GEMM",
        },
        calib_data=windows,
        max_calib_samples=len(windows),
        max_calib_seq_len=length,
        export_compatible=not pack,
        n_parallel_calib_samples=job.get("parallel_samples"),
        quantizer_cls=make_quantizer,
    )
    end, cpu_after = time.perf_counter(), time.process_time()
    quantizer = quantizers[0]
    if not pack:
        with torch.no_grad():
            for block in quantizer.modules:
                for linear in get_named_linears(block).values():
                    linear.weight.data = quantizer.pseudo_quantize_tensor(linear.weight.data)[0]
    if job.get("out"):
        if pack:
            model.save_quantized(job["out"])
        else:
            model.model.save_pretrained(job["out"])
    starts = [*quantizer.block_starts, end]
    return {
        "seconds": end - start,
        "cpu_seconds": cpu_after - cpu_before,
        "block_seconds": [after - before for before, after in itertools.pairwise(starts)],
        "packing_seconds": quantizer.packing_seconds,
        "block_rss_mib": [*quantizer.block_rss_mib[1:], rss_mib()],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@contextlib.contextmanager
def plain_cpu_linears() -> Iterator[None]:
    """Let AutoAWQ load its GEMM linears on a CPU.

    On a CPU it insists on Intel's extension, which has no release for current PyTorch, although
    its GEMM linear has a plain PyTorch path. It asks one function which device there is.
    """
    real = awq_base.get_best_device
    awq_base.get_best_device = lambda: "cpu:plain"
    try:
        yield
    finally:
        awq_base.get_best_device = real


@torch.no_grad()
def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load an AWQ folder as AutoAWQ's users do; write logits and every dequantized linear.

    job["logits"]: a .pt file for [windows, length, vocabulary] float32;
    job["weights"]: a .pt file for {module name: [in_features, out_features] float16}.
    """
    with plain_cpu_linears():
        model = AutoAWQForCausalLM.from_quantized(
            job["model"], fuse_layers=False, device_map={"": "cpu"}
        )
    linears = {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, WQLinear_GEMM)
    }
    weights = {
        name: dequantize_gemm(m.qweight, m.qzeros, m.scales, m.w_bit, m.group_size)
        for name, m in linears.items()
    }
    torch.save(weights, job["weights"])
    tokens = torch.tensor(job["tokens"])
    logits = torch.stack([model.model(window[None]).logits[0].float() for window in tokens])
    torch.save(logits, job["logits"])
    return {"linears": sorted(linears), "logits_shape": list(logits.shape)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    result = {"quantize": quantize, "load": load}[job["task"]](job)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

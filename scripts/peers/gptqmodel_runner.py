"""Runs inside GPTQModel's own environment (setup_gptqmodel.sh): see jobs.py.

GPTQ with its defaults (group-aware activation order, true sequential, damping), asymmetric; AWQ
with its defaults, which it has for 4 bits only.
"""

from __future__ import annotations

import os
from typing import Any

# GPTQModel takes half of the cores as workers. With a single one its loop over the layers waits
# for tasks that wait for a worker: on two cores it would stop there.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.looper.awq_processor import AWQProcessor
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.quantization import AWQConfig, GPTQConfig
from jobs import CannotError, Job, do_job


def _leave_dequantized(self: Any, module: Any, *_: Any) -> None:
    """Instead of packing: the linear already holds its rounded weights."""
    for key in ("q_zeros", "q_scales", "q_g_idx"):
        module.state.pop(key, None)


# Packing compiles an extension and starts more threads, for integers that nobody here reads.
GPTQProcessor.submodule_finalize = _leave_dequantized
AWQProcessor.submodule_finalize = _leave_dequantized


def quantize(
    job: Job, config: GPTQConfig | AWQConfig, dtype: torch.dtype, backend: BACKEND
) -> dict[str, torch.Tensor]:
    """Tensors by name."""
    model = GPTQModel.load(job["model"], config, dtype=dtype, device="cpu")
    model.quantize(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["tokens"]],
        batch_size=1,
        backend=backend,
    )
    return dict(model.model.state_dict())


def gptq(job: Job) -> dict[str, torch.Tensor]:
    config = GPTQConfig(
        bits=job["bits"], group_size=job["group_size"], sym=False, offload_to_disk=False
    )
    # float32: half precision is for GPUs, and slow on a CPU.
    return quantize(job, config, torch.float32, BACKEND.GPTQ_TORCH)


def awq(job: Job) -> dict[str, torch.Tensor]:
    if job["bits"] != 4:
        raise CannotError("GPTQModel's AWQ has 4 bits only")
    config = AWQConfig(
        bits=job["bits"], group_size=job["group_size"], sym=False, offload_to_disk=False
    )
    # float16: the scale search restores the weights from `.to(float32).cpu()`, which on a CPU is a
    # copy only where the weights are not in float32; in float32 scales would be applied repeatedly.
    return quantize(job, config, torch.float16, BACKEND.AWQ_TORCH)


if __name__ == "__main__":
    do_job({"gptq": gptq, "awq": awq})

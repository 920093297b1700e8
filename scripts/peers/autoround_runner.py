"""Runs inside AutoRound's own environment (setup_autoround.sh): see jobs.py.

SignRound with AutoRound's defaults: 200 iterations a block (AUTOROUND_ITERS changes that), batches
of 8, rounding and ranges learned, inputs as the blocks before give them; asymmetric.
"""

from __future__ import annotations

import os

import torch
from auto_round import AutoRound
from jobs import Job, do_job
from transformers import AutoModelForCausalLM, AutoTokenizer

_DEFAULT_ITERATIONS = 200
_BATCH = 8


def signround(job: Job) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(job["tokens"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        scheme="W4A16",
        bits=job["bits"],
        group_size=job["group_size"],
        sym=False,
        iters=int(os.environ.get("AUTOROUND_ITERS", _DEFAULT_ITERATIONS)),
        # Tensors are taken as they are; a data set's name would be tokenized.
        dataset=list(tokens.split(_BATCH)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=_BATCH,
        device_map="cpu",
        # On a CPU AutoRound turns model and activations into bfloat16, whose 8 bits lose more than
        # 4-bit rounding leaves to gain; on a GPU it would keep the float16 of the checkpoint.
        amp=False,
        # Compiling is for GPUs.
        enable_torch_compile=False,
    )
    quantized, _ = rounder.quantize()
    # In process the linears hold their rounded weights; exporting packs the same.
    return dict(quantized.state_dict())


if __name__ == "__main__":
    do_job({"signround": signround})

"""Logits of a folder by AutoAWQ on the CPU: python autoawq.py FOLDER IDS.npy OUT.npy

Its gemm version is dequantized by AutoAWQ's own code. gemv and gemv_fast have CUDA kernels alone:
AutoAWQ loads the folder, and what it holds then is written to OUT as an .npz instead.
"""

import sys

import awq.models.base
import numpy as np
import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear.gemm import WQLinear_GEMM


def main(folder: str, ids: str, out: str) -> None:
    # On a CPU it would insist on a package of kernels that it does not need.
    awq.models.base.get_best_device = lambda: "none"
    model = AutoAWQForCausalLM.from_quantized(
        folder, fuse_layers=False, device_map={"": "cpu"}
    ).model.eval()
    kinds = {type(m) for m in model.modules() if type(m).__name__.startswith("WQLinear")}
    assert len(kinds) == 1, kinds
    if kinds == {WQLinear_GEMM}:
        with torch.no_grad():
            np.save(out, model(torch.from_numpy(np.load(ids))).logits.float().numpy())
    else:
        state = model.state_dict()
        np.savez(out, **{name: tensor.numpy() for name, tensor in state.items()})


main(*sys.argv[1:])

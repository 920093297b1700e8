"""Logits of a folder by transformers and whatever it hands the format to, on the CPU.

python transformers_.py FOLDER IDS.npy OUT.npy DTYPE [dequantize]

dequantize: have compressed-tensors' weights dequantized as they are loaded.
"""

import sys

import numpy as np
import torch
import transformers


def main(folder: str, ids: str, out: str, dtype: str, *how: str) -> None:
    given = {"dtype": getattr(torch, dtype)}
    if how:
        given["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    with torch.no_grad():
        np.save(out, model(torch.from_numpy(np.load(ids))).logits.float().numpy())


main(*sys.argv[1:])

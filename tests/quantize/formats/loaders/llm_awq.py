"""What llm-awq's loader makes of a folder: python llm_awq.py FOLDER CHECKOUT OUT.npz

As `awq.entry --load_quant` does it, up to the CUDA kernels; OUT is the loaded model's state dict.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights, load_checkpoint_in_model
from transformers import AutoConfig, AutoModelForCausalLM


def main(folder: str, checkout: str, out: str) -> None:
    sys.modules["awq_inference_engine"] = types.ModuleType("awq_inference_engine")
    package = types.ModuleType("awq")
    package.__path__ = [str(Path(checkout) / "awq")]
    quantize = types.ModuleType("awq.quantize")  # its own __init__ wants a vision library
    quantize.__path__ = [str(Path(checkout) / "awq" / "quantize")]
    sys.modules |= {"awq": package, "awq.quantize": quantize}
    from awq.quantize.quantizer import real_quantize_model_weight

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
    settings = {"zero_point": True, "q_group_size": 128}
    real_quantize_model_weight(model, w_bit=4, q_config=settings, init_only=True)
    model.tie_weights()
    load_checkpoint_in_model(
        model, checkpoint=f"{folder}/model.safetensors", device_map={"": "cpu"}
    )
    state = model.state_dict()
    assert not any(tensor.is_meta for tensor in state.values())
    np.savez(out, **{name: tensor.numpy() for name, tensor in state.items()})


main(*sys.argv[1:])

"""Runs inside llm-compressor's own environment (setup_llmcompressor.sh): see jobs.py.

AWQ (duo scaling, 20 grid points) and GPTQ (static activation order, damping 0.01) with their
defaults, each on an asymmetric integer grid in groups.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import forward_quantize
from datasets import Dataset
from jobs import Job, do_job
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.modifier import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM


def _unpinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


if not torch.accelerator.is_available():
    # The activation cache pins memory for copies to an accelerator, and pinning without one raises.
    torch.Tensor.pin_memory = _unpinned


def scheme(job: Job) -> dict[str, object]:
    """All linears but lm_head, as llm-compressor's W4A16_ASYM has it, in the job's integers."""
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": job["group_size"],
    }
    return {
        "config_groups": {"linears": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def quantize(job: Job, recipe: list[Modifier]) -> dict[str, torch.Tensor]:
    """Tensors by name; the linears' weights as the quantized model computes with them."""
    # float32: half precision is for GPUs, and slow on a CPU.
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["tokens"]]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]["input_ids"]),
        shuffle_calibration_samples=False,
    )
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            # Compressing is left to saving; until then the weights are not rounded, or not all.
            tensors[f"{name}.weight"] = forward_quantize(
                module, module.weight, "weight", module.quantization_scheme.weights
            )
    return tensors


def awq(job: Job) -> dict[str, torch.Tensor]:
    return quantize(job, [AWQModifier(), QuantizationModifier(**scheme(job))])


def gptq(job: Job) -> dict[str, torch.Tensor]:
    return quantize(job, [GPTQModifier(**scheme(job))])


if __name__ == "__main__":
    do_job({"awq": awq, "gptq": gptq})

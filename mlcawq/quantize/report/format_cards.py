"""What a model card says of each storage format: how the weights lie there, and what loads them."""

from __future__ import annotations

from mlcawq.families import FAMILIES
from mlcawq.quantize.report.card import FormatCard, Use

_TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="float16", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
"""
# Without `dequantize`, transformers 5.23 loads no packed zero points.
_DEQUANTIZED = """
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained(
    "THIS_FOLDER",
    dtype="float16",
    quantization_config=CompressedTensorsConfig(dequantize=True),  # not for 8-bit activations
)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
"""
_AUTOAWQ = """
from awq import AutoAWQForCausalLM

model = AutoAWQForCausalLM.from_quantized("THIS_FOLDER", fuse_layers=False)
"""
_VLLM = """
from vllm import LLM

print(LLM("THIS_FOLDER", dtype="float16").generate("Once upon a time"))
"""
_REPACK = "mlcawq repack THIS_FOLDER -o OUT --format awq"

_WITH_GPTQMODEL = Use("transformers (with `pip install gptqmodel`)", "python", _TRANSFORMERS)
_WITH_AUTOAWQ = Use("AutoAWQ", "python", _AUTOAWQ)
_WITH_AUTOAWQ_ON_CUDA = Use("AutoAWQ, on CUDA", "python", _AUTOAWQ)
_WITH_VLLM = Use("vLLM", "python", _VLLM)
_WITH_LLM_AWQ = Use(
    "llm-awq, in a checkout of it",
    "sh",
    """
    python -m awq.entry --model_path THIS_FOLDER --w_bit 4 --q_group_size 128 \\
        --load_quant THIS_FOLDER/model.safetensors --tasks wikitext
    python tinychat/demo.py --model_type llama --model_path THIS_FOLDER \\
        --q_group_size 128 --load_quant THIS_FOLDER/model.safetensors
    """,
)
_AS_GEMM = Use("Everything else (vLLM, SGLang, mlc_llm), after a repacking", "sh", _REPACK)

FORMAT_CARDS = {
    "awq": FormatCard(
        'Stored as AutoAWQ\'s "gemm" version; all other tensors are float16.',
        "awq",
        (
            _WITH_GPTQMODEL,
            _WITH_VLLM,
            _WITH_AUTOAWQ,
            Use(
                "mlcawq: compiled for this machine",
                "sh",
                """
                mlcawq build THIS_FOLDER -o OUT --target cpu
                mlcawq chat OUT
                """,
                only=FAMILIES,
            ),
            Use(
                "mlc_llm, for the families that it has",
                "sh",
                "mlcawq build THIS_FOLDER -o OUT --via mlc-llm",
            ),
        ),
    ),
    "awq-gemv": FormatCard(
        'Stored as AutoAWQ\'s "gemv" version, for one sequence at a time; all other tensors are '
        "float16.",
        "awq",
        (_WITH_AUTOAWQ_ON_CUDA, _AS_GEMM),
    ),
    "awq-gemv-fast": FormatCard(
        'Stored as AutoAWQ\'s "gemv_fast" version; all other tensors are float16.',
        "awq",
        (_WITH_AUTOAWQ_ON_CUDA, _AS_GEMM),
    ),
    "llm-awq": FormatCard(
        "Stored as llm-awq (MIT-HAN-Lab) packs weights, in safetensors; all other tensors are "
        "float16.",
        "awq",
        (_WITH_LLM_AWQ, _AS_GEMM),
    ),
    "compressed-tensors": FormatCard(
        "Stored as compressed-tensors; all other tensors are float16.",
        "compressed-tensors",
        (
            Use("transformers (with `pip install compressed-tensors`)", "python", _DEQUANTIZED),
            Use("vLLM (4 and 8 bits)", "python", _VLLM),
        ),
    ),
    "fake": FormatCard(
        "Stored dequantized, in float16: for measuring, not for saving space.",
        None,
        (
            Use("transformers", "python", _TRANSFORMERS),
            _WITH_VLLM,
            Use("mlcawq: measured", "sh", "mlcawq eval THIS_FOLDER --text wikitext2"),
        ),
    ),
}

"""Storage formats of quantized linears: one file each, by the name that --format takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcawq.errors import UserError
from mlcawq.quantize.formats.awq_gemm import AwqGemm
from mlcawq.quantize.formats.awq_gemv import AwqGemv
from mlcawq.quantize.formats.awq_gemv_fast import AwqGemvFast
from mlcawq.quantize.formats.base import Format, IntegerFormat
from mlcawq.quantize.formats.compressed_tensors import CompressedTensors
from mlcawq.quantize.formats.fake import Fake
from mlcawq.quantize.formats.llm_awq import LlmAwq

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (AwqGemm(), AwqGemv(), AwqGemvFast(), LlmAwq(), CompressedTensors(), Fake())
}


def find_format(name: str) -> Format:
    """The format that --format names. Raises UserError for a name that is none."""
    try:
        return FORMATS[name]
    except KeyError:
        known = ", ".join(FORMATS)
        raise UserError.one(f"no format {name!r}", "--format", f"one of {known}") from None


def stored_format(config: Mapping[str, Any], where: str = "config.json") -> IntegerFormat:
    """The format of a folder with that `quantization_config`. Raises UserError for others."""
    integers = [fmt for fmt in FORMATS.values() if isinstance(fmt, IntegerFormat)]
    for fmt in integers:
        if fmt.reads(config):
            return fmt
    method, version = config.get("quant_method"), config.get("version") or config.get("format")
    found = " ".join(repr(part) for part in (method, version) if part)
    readable = ", ".join(fmt.name for fmt in integers)
    raise UserError.one(
        f"quantization {found or 'without a method'} is not read",
        where,
        f"the formats that are read: {readable}",
    )

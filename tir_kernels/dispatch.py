"""Which kernel serves which target: the entry for compilers."""

from __future__ import annotations

from tir_kernels import cpu
from tir_kernels._tvm import PrimFunc, Target
from tir_kernels.layouts import LinearShape

_ACT_DTYPES = ("float16", "float32")


def w4a16_linear(
    target: Target,
    K: int,
    N: int,
    group_size: int,
    act_dtype: str = "float16",
    bias: bool = False,
    out_dtype: str | None = None,
) -> PrimFunc:
    """A linear on 4-bit weights in the stock AutoAWQ layout (see `tir_kernels.layouts`).

    The function takes (x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N]) with symbolic
    m, sums in fp32 and is scheduled already (`tirx.is_scheduled`, opaque `op_pattern`). out_dtype
    is act_dtype unless given. Raises ValueError for shapes that the layout cannot hold, and
    NotImplementedError for a target without kernels.
    """
    _check_dtypes(act_dtype, out_dtype or act_dtype)
    shape = LinearShape(K, N, group_size)
    _require_cpu(target)
    return cpu.w4a16_linear(target, shape, act_dtype, out_dtype or act_dtype, bias)


def dense_linear(
    target: Target,
    K: int,
    N: int,
    act_dtype: str = "float16",
    bias: bool = False,
    out_dtype: str | None = None,
) -> PrimFunc:
    """A linear on an unquantized weight [N, K]: (x [m, K], weight[, bias [N]], out [m, N]).

    As `w4a16_linear` otherwise.
    """
    _check_dtypes(act_dtype, out_dtype or act_dtype)
    _require_cpu(target)
    return cpu.dense_linear(target, K, N, act_dtype, out_dtype or act_dtype, bias)


def _check_dtypes(*dtypes: str) -> None:
    for dtype in dtypes:
        if dtype not in _ACT_DTYPES:
            raise ValueError(f"dtype {dtype} is not one of {_ACT_DTYPES}")


def _require_cpu(target: Target) -> None:
    if target.kind.name != "llvm":
        raise NotImplementedError(f"no kernels for target kind {target.kind.name!r}")

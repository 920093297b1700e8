"""Which kernel serves which target: the entry for compilers."""

from __future__ import annotations

from types import ModuleType

from tir_kernels import cpu, cuda, vulkan
from tir_kernels._tvm import PrimFunc, Target
from tir_kernels.cpu import packed_rows, w8a16
from tir_kernels.cpu.decode_block import DecodeBlock
from tir_kernels.cpu.decode_block import decode_block as one_launch
from tir_kernels.int8_weights import Int8Shape
from tir_kernels.layouts import AUTOAWQ, BLOCKED, TILED, BlockedShape, ExpertsShape, LinearShape

_ROOMS = {"llvm": cpu, "cuda": cuda, "webgpu": vulkan, "vulkan": vulkan}
_ACT_DTYPES = {
    cpu: ("float16", "float32"),
    cuda: ("float16", "bfloat16"),
    vulkan: ("float16", "float32"),
}
_SCALE_DTYPES = ("float16", "float32")


def kernels_for(target: Target) -> ModuleType:
    """The package with a target's kernels; all of them export the names of `tir_kernels.cpu`.

    Raises NotImplementedError for a kind of target without kernels.
    """
    kind = target.kind.name
    if kind not in _ROOMS:
        raise NotImplementedError(f"no kernels for target kind {kind!r}")
    return _ROOMS[kind]


def w4a16_linear(
    target: Target,
    K: int,
    N: int,
    group_size: int,
    act_dtype: str = "float16",
    bias: bool = False,
    out_dtype: str | None = None,
    *,
    layout: str = AUTOAWQ,
    silu: bool = False,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc:
    """A linear on 4-bit weights (see `tir_kernels.layouts`).

    The function takes (x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N]) with symbolic
    m, sums in fp32 and is scheduled already (`tirx.is_scheduled`, opaque `op_pattern`). x and bias
    are of act_dtype, as is out unless out_dtype is given; the shapes of the weight's arrays are
    those of `LinearShape.parameters`.

    silu, for the tiled layout of a fused gate_up of N outputs with its rows interleaved: out is
    silu(gate) * up [m, N/2]. A bias is added before that and lies in the natural order, gates
    first.

    act_bits, for the blocked layout: of the integers, 16 or 8, that x is rounded to, with a scale
    for each row and group of inputs (`tir_kernels.cpu.activations`).

    Raises ValueError for what the layout or the target's kernels do not have, and
    NotImplementedError for a target without kernels.
    """
    room = kernels_for(target)
    out_dtype = out_dtype or act_dtype
    _check_dtypes(target, act_dtype, out_dtype)
    _check_scale_dtype(scale_dtype)
    shape = (BlockedShape if layout == BLOCKED else LinearShape)(K, N, group_size)
    shape.parameters(layout)  # knows the layouts
    if silu and layout != TILED:
        raise ValueError(f"silu is fused into kernels of the layout {TILED} only, not {layout}")
    if silu and N % 16:
        raise ValueError(f"a gate_up of {N} outputs cannot be interleaved: not a multiple of 16")
    if act_bits != 16 and (room is not cpu or layout != BLOCKED):
        raise ValueError(f"activations are rounded on CPUs for the layout {BLOCKED} only")
    rounding = {"act_bits": act_bits} if room is cpu else {}
    return room.w4a16_linear(
        target,
        shape,
        act_dtype,
        out_dtype,
        bias,
        layout=layout,
        silu=silu,
        scale_dtype=scale_dtype,
        **rounding,
    )


def decode_block(
    target: Target,
    block: DecodeBlock,
    eps: float,
    dtype: str = "float16",
    *,
    layout: str = BLOCKED,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc | None:
    """One row through all that lies between two attentions (see `cpu.decode_block`), to the bit as
    separate kernels compute it. None for targets and layouts that have no such kernel.
    """
    if kernels_for(target) is not cpu or layout != BLOCKED:
        return None
    return one_launch(target, block, eps, dtype, scale_dtype=scale_dtype, act_bits=act_bits)


def w8a16_linear(
    target: Target,
    K: int,
    N: int,
    group_size: int,
    act_dtype: str = "float16",
    out_dtype: str | None = None,
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """A linear on 8-bit weights (see `tir_kernels.int8_weights`): (x [m, K], qweight, scales,
    out [m, N]). As `w4a16_linear` otherwise; the CPU has kernels for it.
    """
    out_dtype = out_dtype or act_dtype
    _check_packed(target, act_dtype, out_dtype, scale_dtype)
    shape = Int8Shape(K, N, group_size)
    return w8a16.w8a16_linear(target, shape, act_dtype, out_dtype, scale_dtype=scale_dtype)


def take_packed_rows(
    target: Target,
    bits: int,
    rows: int,
    width: int,
    group_size: int,
    dtype: str = "float16",
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """Rows of a weight [rows, width] as `w8a16_linear` has it (bits 8), or `w4a16_linear` in the
    blocked layout (bits 4): (qweight[, qzeros], scales, numbers int32 [m], out [m, width]).

    A number out of range is clipped. Raises as those do.
    """
    _check_packed(target, dtype, dtype, scale_dtype)
    if bits == 8:
        int8 = Int8Shape(width, rows, group_size)
        return packed_rows.take_int8_rows(target, int8, dtype, scale_dtype=scale_dtype)
    int4 = BlockedShape(width, rows, group_size)
    return packed_rows.take_int4_rows(target, int4, dtype, scale_dtype=scale_dtype)


def w4a16_experts_decode(
    target: Target,
    experts: int,
    K: int,
    N: int,
    group_size: int,
    act_dtype: str = "float16",
    out_dtype: str | None = None,
    *,
    x_rows: int,
    rows: int,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """One token's rows, each times the weight of an expert of its own (see `tir_kernels.experts`).

    The function takes (x [x_rows, K], chosen int32 [1, rows], qweight, qzeros, scales, out
    [rows, N]): row r of out is of expert chosen[0, r] and of row r of x, or of its only row where
    x_rows is 1. Weights are in the stock layout; all else is as in `w4a16_linear`.

    Raises what `w4a16_linear` does.
    """
    out_dtype = out_dtype or act_dtype
    shape = _check_experts(target, experts, K, N, group_size, act_dtype, out_dtype, scale_dtype)
    if rows < 1 or x_rows not in (1, rows):
        raise ValueError(f"{x_rows} rows of x for {rows} of out: not one, nor as many")
    return kernels_for(target).w4a16_experts_decode(
        target, shape, x_rows, rows, act_dtype, out_dtype, scale_dtype=scale_dtype
    )


def w4a16_experts_grouped(
    target: Target,
    experts: int,
    K: int,
    N: int,
    group_size: int,
    act_dtype: str = "float16",
    out_dtype: str | None = None,
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """Rows sorted by expert, those of each times its weight (see `tir_kernels.experts`).

    The function takes (x [m, K], indptr int32 [experts + 1], qweight, qzeros, scales, out [m, N])
    with symbolic m; rows indptr[e] .. indptr[e + 1] - 1 are of expert e. As `w4a16_experts_decode`
    otherwise.
    """
    out_dtype = out_dtype or act_dtype
    shape = _check_experts(target, experts, K, N, group_size, act_dtype, out_dtype, scale_dtype)
    return kernels_for(target).w4a16_experts_grouped(
        target, shape, act_dtype, out_dtype, scale_dtype=scale_dtype
    )


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
    room = kernels_for(target)
    out_dtype = out_dtype or act_dtype
    _check_dtypes(target, act_dtype, out_dtype)
    return room.dense_linear(target, K, N, act_dtype, out_dtype, bias)


def _check_packed(target: Target, act_dtype: str, out_dtype: str, scale_dtype: str) -> None:
    if kernels_for(target) is not cpu:
        raise ValueError(f"there are no kernels for packed tables on {target.kind.name}")
    _check_dtypes(target, act_dtype, out_dtype)
    _check_scale_dtype(scale_dtype)


def _check_experts(
    target: Target,
    experts: int,
    K: int,
    N: int,
    group_size: int,
    act_dtype: str,
    out_dtype: str,
    scale_dtype: str,
) -> ExpertsShape:
    _check_dtypes(target, act_dtype, out_dtype)
    _check_scale_dtype(scale_dtype)
    return ExpertsShape(K, N, group_size, experts)


def _check_scale_dtype(scale_dtype: str) -> None:
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale dtype {scale_dtype} is not one of {_SCALE_DTYPES}")


def _check_dtypes(target: Target, act_dtype: str, out_dtype: str) -> None:
    known = _ACT_DTYPES[kernels_for(target)]
    if act_dtype not in known:
        raise ValueError(f"dtype {act_dtype} is not one of {known} for {target.kind.name}")
    if out_dtype not in (act_dtype, "float32"):
        raise ValueError(f"output dtype {out_dtype} is neither {act_dtype} nor float32")

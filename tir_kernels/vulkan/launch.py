"""From the arguments of a linear to launches of kernels.

Kernels come as block builders: TVMScript inline functions (m, count, first_column, x_view,
operands, bias, out) that launch workgroups for `count` units of the weight (stripes of 16 outputs
in the tiled layout, words of 8 in the stock one, single outputs in an unquantized weight), whose
outputs begin at `first_column` of out. x_view and operands are the tensors as vectors: the code
generator for WGSL takes the type of a storage buffer from its declaration, and an aligned vector is
loaded at once only from a buffer of such vectors.

The functions here make linears of them: inline functions (m, x, parameters, bias, out) on tensors.
A weight that is larger than a storage binding is handed over in parts, one launch each. A part has
whole workgroups: what a workgroup makes of units beyond `count` lies beyond out, and is not stored.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T, Target
from tir_kernels.layouts import AUTOAWQ, TILE_N, TILE_WORDS, TILED, LinearShape
from tir_kernels.vulkan.epilogue import Epilogue
from tir_kernels.vulkan.limits import limits_of, rows_in_binding, window_address
from tir_kernels.vulkan.reading import Reader
from tir_kernels.vulkan.schedule import COLUMNS

_BYTES = {"float16": 2, "float32": 4}


def by_rows(linears: list[tuple[int, Any]], rest: Any) -> Any:
    """A linear that takes the first of (rows, linear) with m <= rows, or `rest`."""
    if not linears:
        return rest
    (rows, few), others = linears[0], by_rows(linears[1:], rest)

    @T.inline
    def linear(m, x, parameters, bias, out):
        if T.tvm_thread_invariant(m <= rows):
            few(m, x, parameters, bias, out)
        else:
            others(m, x, parameters, bias, out)

    return linear


def tiled(
    target: Target,
    shape: LinearShape,
    scale_dtype: str,
    epilogue: Epilogue,
    reader: Reader,
    block: Any,
) -> Any:
    """parameters: qweight, qzeros, scales in the tiled layout. Operands: words [stripes, tiles, 32]
    int32x4, zeros [stripes, groups, 2] int32, scales [stripes, groups, 8] in pairs.
    """
    stripes, tiles, groups = shape.tile_rows, shape.tile_columns, shape.groups
    scale_bytes = groups * TILE_N * _BYTES[scale_dtype]
    at_once = rows_in_binding(target, stripes, tiles * TILE_WORDS * 4, scale_bytes)
    launches = -(-stripes // at_once)
    address = T.address_of if launches == 1 else window_address

    @T.inline
    def linear(m, x, parameters, bias, out):
        qweight, qzeros, scales = T.meta_var(parameters)
        x_view = T.decl_buffer(reader.view_shape(m), reader.view, data=T.address_of(x[0, 0]))
        for launch in range(launches):
            start = T.meta_var(launch * at_once)
            words = T.decl_buffer(
                (at_once, tiles, 32), "int32x4", data=address(qweight[start, 0, 0])
            )
            zeros = T.decl_buffer((at_once, groups, 2), "int32", data=address(qzeros[start, 0, 0]))
            scale_pairs = T.decl_buffer(
                (at_once, groups, 8), f"{scale_dtype}x2", data=address(scales[start, 0, 0])
            )
            block(
                m, T.min(at_once, stripes - start), epilogue.columns(start * TILE_N),
                x_view, (words, zeros, scale_pairs), bias, out,
            )  # fmt: skip

    return linear


def stock(
    target: Target,
    shape: LinearShape,
    scale_dtype: str,
    reader: Reader,
    block: Any,
) -> Any:
    """parameters: qweight, qzeros, scales in the stock layout. Operands: qweight, qzeros, scales
    [groups, N / 2] in pairs.

    Raises NotImplementedError for weights that are larger than a storage binding: outputs are not
    apart from each other in this layout.
    """
    limit = limits_of(target).binding_bytes
    if shape.K * shape.words * 4 > limit:
        raise NotImplementedError(
            f"the weight {shape.K} x {shape.N} in the layout {AUTOAWQ} is larger than a storage "
            f"binding of {limit} bytes; in the layout {TILED} it can be split"
        )

    @T.inline
    def linear(m, x, parameters, bias, out):
        qweight, qzeros, scales = T.meta_var(parameters)
        x_view = T.decl_buffer(reader.view_shape(m), reader.view, data=T.address_of(x[0, 0]))
        scale_pairs = T.decl_buffer(
            (shape.groups, shape.N // 2), f"{scale_dtype}x2", data=T.address_of(scales[0, 0])
        )
        block(m, shape.words, 0, x_view, (qweight, qzeros, scale_pairs), bias, out)

    return linear


def dense(target: Target, N: int, reader: Reader, block: Any) -> Any:
    """parameters: weight [N, K]. Operands: the weight as `reader` sees it."""
    row_bytes = reader.K * _BYTES[reader.dtype]
    at_once = rows_in_binding(target, N, row_bytes, multiple=COLUMNS)
    launches = -(-N // at_once)
    address = T.address_of if launches == 1 else window_address

    @T.inline
    def linear(m, x, weight, bias, out):
        x_view = T.decl_buffer(reader.view_shape(m), reader.view, data=T.address_of(x[0, 0]))
        for launch in range(launches):
            start = T.meta_var(launch * at_once)
            weight_view = T.decl_buffer(
                reader.view_shape(at_once), reader.view, data=address(weight[start, 0])
            )
            block(m, T.min(at_once, N - start), start, x_view, weight_view, bias, out)

    return linear

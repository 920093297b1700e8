"""Kernels in the form in which modules of mlc_llm's kind take them.

Such modules hold 4-bit weights as uint32, where kernels read int32; and passes over them look into
a function's root block, which kernels written as plain loops do not have.
"""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, is_buffer_var, tirx
from tir_kernels.memo import memoized


def with_root_block(function: PrimFunc) -> PrimFunc:
    """`function` with its body in a root block, as Relax's analyses ask for."""
    if isinstance(function.body, tirx.SBlockRealize):
        return function
    root = tirx.SBlock([], [], [], "root", function.body)
    return function.with_body(tirx.SBlockRealize([], True, root))


@memoized
def with_unsigned_words(function: PrimFunc) -> PrimFunc:
    """`function` with uint32 parameters in place of its int32 weights, over the same kernels.

    Weights are the parameters whose names end in qweight and qzeros.

    The host code hands the pointers on; kernels see them as they were.
    """
    params, views = [], []
    for param in function.params:
        if is_buffer_var(param) and param.name.rpartition("_")[2] in ("qweight", "qzeros"):
            unsigned = tirx.decl_buffer(param.shape, "uint32", name=param.name)
            first = tirx.BufferLoad(unsigned, [0] * len(param.shape))
            views.append(tirx.DeclBuffer(param, data=tirx.address_of(first)))
            param = unsigned
        params.append(param)
    block = with_root_block(function).body.block
    root = tirx.SBlock(
        [],
        [],
        [],
        "root",
        tirx.SeqStmt([*views, block.body]),
        alloc_buffers=block.alloc_buffers,
        annotations=block.annotations,
    )
    body = tirx.SBlockRealize([], True, root)
    return PrimFunc(params, body, function.ret_type, function.attrs)

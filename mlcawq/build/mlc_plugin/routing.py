"""What chooses experts in mlc_llm's models, on a TVM and on targets that it was not written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import IRModule, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T  # noqa: N812 - TVMScript's own name for it
from tvm.target import Target
from tvm.tirx.stmt_functor import ir_transform

from tir_kernels import dispatch
from tir_kernels.foreign import with_root_block


def install() -> None:
    """Mend mlc_llm's choice of experts; called after it is imported."""
    from mlc_llm.op import moe_misc

    moe_misc._gating_topk_init_local_top_k = start_top_k
    moe_misc.get_indptr = get_indptr
    moe_misc.moe_cumsum = _with_kernels(moe_misc.moe_cumsum)


def start_top_k(k: int, dtype: str, values: Any, indices: Any) -> None:
    """TIR that sets the k best values and their indices to those of nothing.

    mlc_llm's writes its indices one element before the buffer, which on a processor is somebody
    else's memory, and leaves the buffer as it finds it.
    """
    for t in range(k):
        T.buffer_store(values, T.min_value(dtype), indices=[t])
        T.buffer_store(indices, t, indices=[t])


def _with_kernels(theirs: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """mlc_llm's moe_cumsum by a kernel of ours, where the target that is compiled for has one.

    On GPUs, mlc_llm takes TVM's cumsum: several launches, and views of its input and output of
    which TVM 0.26 does not know when it plans memory, so that it hands out the same memory again.
    """

    def moe_cumsum(expert_indices: Tensor, num_local_experts: int) -> Tensor:
        target = Target.current(allow_none=True)
        try:
            kernels = None if target is None else dispatch.kernels_for(target)
        except NotImplementedError:
            kernels = None
        if kernels is None:
            return theirs(expert_indices, num_local_experts)
        tokens, chosen = expert_indices.shape
        count = kernels.expert_sums(target, num_local_experts, chosen)
        out = Tensor.placeholder([tokens * num_local_experts], "int32")
        return op.tensor_ir_op(with_root_block(count), "expert_sums", [expert_indices], out)

    return moe_cumsum


def get_indptr(
    cumsum: Tensor, num_local_experts: int, batch_size: Any, inclusive: bool, out_dtype: str
) -> Tensor:
    """How many rows the experts up to each have: out_dtype [E + 1] from 0 on, or [E] if inclusive.

    As mlc_llm's, whose kernel takes a number beside tensors, in a place where it is no longer
    looked for from TVM 0.26 on.
    cumsum int32 [E * batch_size]: over tokens, expert after expert, of whether one goes there.
    """
    before = 1 if inclusive else 0
    experts = num_local_experts
    count = experts + 1 - before

    # The number of tokens follows from the sums: as an argument of its own, it is what fails.
    @T.prim_func(private=True, s_tir=True)
    def first_rows(sums_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        sums = T.match_buffer(sums_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (count,), out_dtype)
        for i in range(count):
            with T.sblock("indptr"):
                e = T.axis.spatial(count, i)
                last = T.meta_var((e + before) * (n // experts) - 1)
                out[e] = T.Cast(out_dtype, T.if_then_else(e + before > 0, sums[last], 0))

    return op.tensor_ir_op(
        first_rows,
        "get_expert_instance_indptr",
        [cumsum],
        Tensor.placeholder([count], out_dtype),
    )


def serial_threads(module: IRModule) -> IRModule:
    """`module` for a processor without blocks of threads: their loops run one after the other.

    mlc_llm writes the choice of experts as GPU kernels, whose threads have nothing to do with each
    other.
    """

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.THREAD_BINDING:
            return None
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body,
            annotations=loop.annotations,
        )  # fmt: skip

    def change(function: tirx.PrimFunc) -> tirx.PrimFunc:
        return function.with_body(ir_transform(function.body, None, serial, ["tirx.For"]))

    changed = {
        name: change(function) if isinstance(function, tirx.PrimFunc) else function
        for name, function in module.functions_items()
    }
    return tvm.IRModule(changed, attrs=module.attrs)

"""SwiGLU's activation on its own, for linears that do not end in it."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import at, threads_for, vector_view, vector_width
from tir_kernels.memo import memoized

# exp(-x) of a gate below this is left at exp(80): infinity is not a value that WGSL promises, and
# the quotient is zero in fp16 and next to nothing in fp32.
_STEEPEST = -80.0


@memoized
def silu_multiply(target: Target, size: int, dtype: str) -> PrimFunc:
    """(gate_up [m, 2 size], out [m, size]): silu(gate) * up, as in SwiGLU (arXiv 2002.05202)."""
    vec = vector_width(target, size, dtype)
    threads = threads_for(size // vec)
    blocks = -(-size // (threads * vec))

    @T.prim_func(private=True, s_tir=True)
    def activate(gate_up_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int32()
        gate_up = T.match_buffer(gate_up_handle, (m, 2 * size), dtype)
        out = T.match_buffer(out_handle, (m, size), dtype)
        gate_up_view = vector_view(gate_up, dtype, vec)
        out_view = vector_view(out, dtype, vec)
        for r in T.thread_binding(m, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    gate = T.alloc_buffer((vec,), dtype, scope="local")
                    up = T.alloc_buffer((vec,), dtype, scope="local")
                    result = T.alloc_buffer((vec,), dtype, scope="local")
                    v = T.meta_var(block * threads + t)
                    if v < size // vec:
                        gate[at(0, vec)] = gate_up_view[r, v]
                        up[at(0, vec)] = gate_up_view[r, size // vec + v]
                        for j in T.unroll(vec):
                            result[j] = T.Cast(
                                dtype,
                                silu(T.Cast("float32", gate[j])) * T.Cast("float32", up[j]),
                            )
                        out_view[r, v] = result[at(0, vec)]

    return activate


def silu(x):
    """x * sigmoid(x) of an fp32 expression."""
    return x / (T.float32(1) + T.exp(T.float32(0) - T.max(x, T.float32(_STEEPEST))))

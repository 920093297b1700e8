"""Few rows times an unquantized weight [N, K]: every weight is read once.

Teams of 32 invocations have a few outputs each. They walk along K together, each invocation 16
bytes of each output at a time, and the activations of a chunk, which all teams want, go through
workgroup memory, in the order in which the invocations of a team read them.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.vulkan.epilogue import Epilogue, Sums, reduce_and_store
from tir_kernels.vulkan.limits import Limits
from tir_kernels.vulkan.reading import Reader
from tir_kernels.vulkan.schedule import LANES, DenseFewRows


def dense_few_rows(
    reader: Reader, schedule: DenseFewRows, epilogue: Epilogue, limits: Limits
) -> Any:
    """A block builder (see `launch`) for m <= schedule.rows and the operand of `launch.dense`."""
    K = reader.K
    rows, teams, outputs, depth = schedule.rows, schedule.teams, schedule.outputs, schedule.depth
    invocations = schedule.invocations
    width, fours = reader.width, reader.fours
    chunk = LANES * width * depth
    vectors = LANES * fours * depth
    chunks = -(-K // chunk)
    exact = K % chunk == 0
    fetch, convert = reader.fetch(exact), reader.convert()
    fetch_weight = reader.fetch(exact, zeros=False)  # nothing is multiplied with what is beyond K
    sums = Sums(
        rows,
        invocations,
        pairs=outputs // 2,
        members=LANES,
        slot=lambda p: p % (outputs // 2),
        member=lambda p, c: p // (outputs // 2) * LANES + c,
        columns=lambda p: (2 * p, 2 * p + 1),
    )
    finish = reduce_and_store(sums, epilogue, limits.workgroup_bytes - rows * vectors * 16)

    @T.inline
    def stage(m, k, thread, x_view, xs):
        registers = T.alloc_buffer((4,), reader.register, scope="local")
        values = T.alloc_buffer((width,), "float32", scope="local")
        for j in T.unroll(-(-rows * LANES * depth // invocations)):
            v = T.meta_var(thread + j * invocations)
            if v < rows * LANES * depth:
                row = T.meta_var(T.min(v // (LANES * depth), m - 1) if rows > 1 else 0)
                fetch(x_view, row, k + v % (LANES * depth) * width, registers, 0)
                convert(registers, 0, values)
                for e in T.unroll(fours):
                    xs[(v // LANES * fours + e) * LANES + v % LANES] = values[T.ramp(4 * e, 1, 4)]

    @T.inline
    def multiply(u, lane, registers, xs, total):
        values = T.alloc_buffer((width,), "float32", scope="local")
        weight = T.alloc_buffer((outputs * width,), "float32", scope="local")
        four = T.alloc_buffer((4,), "float32", scope="local")
        for o in T.unroll(outputs):
            convert(registers, o * depth + u, values)
            for i in T.unroll(width):
                weight[o * width + i] = values[i]
        for r in T.unroll(rows):
            for e in T.unroll(fours):
                four[T.ramp(0, 1, 4)] = xs[((r * depth + u) * fours + e) * LANES + lane]
                for o in T.unroll(outputs):
                    for i in T.unroll(4):
                        total[r * outputs + o] = (
                            total[r * outputs + o] + four[i] * weight[o * width + e * 4 + i]
                        )

    @T.inline
    def kernel(m, count, first_column, x_view, weight, bias, out):
        for block in T.thread_binding(T.ceildiv(count, teams * outputs), thread="blockIdx.x"):
            for thread in T.thread_binding(invocations, thread="threadIdx.x"):
                xs = T.alloc_buffer((rows * vectors,), "float32x4", scope="shared")
                registers = T.alloc_buffer((outputs * depth * 4,), reader.register, scope="local")
                total = T.alloc_buffer((rows * outputs,), "float32", scope="local")
                lane = T.meta_var(thread % LANES)
                first = T.meta_var((block * teams + thread // LANES) * outputs)
                for o in T.unroll(rows * outputs):
                    total[o] = T.float32(0)
                for c in range(chunks):
                    for o in T.unroll(outputs):
                        for u in T.unroll(depth):
                            k = T.meta_var(c * chunk + (u * LANES + lane) * width)
                            fetch_weight(
                                weight, T.min(first + o, count - 1), k, registers, o * depth + u
                            )
                    if chunks > 1:
                        T.tvm_storage_sync("shared")
                    stage(m, c * chunk, thread, x_view, xs)
                    T.tvm_storage_sync("shared")
                    for u in T.unroll(depth):
                        multiply(u, lane, registers, xs, total)
                finish(m, first_column + block * teams * outputs, thread, total, bias, out)

    return kernel

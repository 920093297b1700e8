"""The kernel that reads memory as fast as it can be read."""

from tir_kernels._tvm import PrimFunc, T

LANES = 16  # int32 of a cache line
STREAMS = 4  # sums that do not wait for each other


def read_kernel(threads: int, ahead: int) -> PrimFunc:
    """(data int32 [rows, LANES], sums int32 [threads, LANES]); rows: a multiple of
    threads * STREAMS. ahead: rows that a row is asked for before its use; 0: not at all.
    """
    every = T.ramp(0, 1, LANES)

    @T.prim_func(s_tir=True)
    def read(data_handle: T.handle, sums: T.Buffer((threads, LANES), "int32", align=64)):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = T.int64()
        data = T.match_buffer(data_handle, (rows, LANES), "int32", align=64)
        for thread in T.parallel(threads):
            part = T.alloc_buffer((STREAMS, LANES), "int32", scope="local")
            for stream in T.unroll(STREAMS):
                part[stream, every] = T.broadcast(0, LANES)
            for i in range(rows // (threads * STREAMS)):
                for stream in T.unroll(STREAMS):
                    row = T.meta_var((rows // (threads * STREAMS) * thread + i) * STREAMS + stream)
                    if ahead > 0:
                        line = T.meta_var(T.address_of(data[row + ahead, 0]))
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", line, 0, 3, 1))
                    part[stream, every] = part[stream, every] + data[row, every]
            for stream in T.unroll(STREAMS):
                if stream == 0:
                    sums[thread, every] = part[stream, every]
                else:
                    sums[thread, every] = sums[thread, every] + part[stream, every]

    return read

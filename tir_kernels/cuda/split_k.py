"""Splitting the inputs of a product among blocks where its outputs are too few to fill the GPU.

Each block of a tile stores its fp32 sums in a workspace and counts itself in; the last one to come
adds the sums of all, in their order, so that results do not depend on timing, and goes on to the
epilogue. One launch; with 64 tokens and four splits of 4096 inputs, what is written and read again
through the second-level cache is as many bytes as the tile's weights.

The workspace belongs to the module, not to the call. Memory from TVM's workspace pool would have to
stay where it is as long as a captured CUDA graph refers to it, and the pool moves when another
kernel asks for more. A cluster's shared memory would do without, on sm_90 only. The price is that
kernels of one module must not run side by side on several streams.

Counters start at zero when the module is loaded; the last block of a tile puts its counter back.
"""

from __future__ import annotations

from tir_kernels._tvm import T
from tir_kernels.cuda.device import DeviceFunction, registers
from tir_kernels.cuda.tile import WORKSPACE_FLOATS, unrolled

COUNTERS = 1 << 12

_DECLARATIONS = f"""
#ifndef TIR_SPLIT_K
#define TIR_SPLIT_K
__device__ float4 tir_partial_sums[{WORKSPACE_FLOATS // 4}];
__device__ unsigned tir_arrivals[{COUNTERS}];
#endif
"""

# Four sums to and from the workspace, past the SM's cache, where other SMs' writes do not show:
# (index, float d[4]).
_store = DeviceFunction(
    "tir_store_partial_sums",
    "int index, const float* d",
    "  __stcg(&tir_partial_sums[index], make_float4(d[0], d[1], d[2], d[3]));",
    declarations=_DECLARATIONS,
    portable=True,
)
_add = DeviceFunction(
    "tir_add_partial_sums",
    "int index, float* d",
    """
  const float4 v = __ldcg(&tir_partial_sums[index]);
  d[0] += v.x;
  d[1] += v.y;
  d[2] += v.z;
  d[3] += v.w;
""",
    declarations=_DECLARATIONS,
    portable=True,
)
# All threads of a block come here after their stores. Not zero in the last of `splits` blocks,
# which then sees what the others have stored: (tile, splits) -> uint32.
_arrive = DeviceFunction(
    "tir_arrive",
    "int tile, int splits",
    """
  __threadfence();
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    last = atomicAdd(&tir_arrivals[tile], 1u) == splits - 1;
    if (last) tir_arrivals[tile] = 0;
  }
  last = __syncthreads_or(last);
  __threadfence();
  return last;
""",
    "uint32",
    declarations=_DECLARATIONS,
    portable=True,
)


@T.inline
def exchange(sums, count, tile, split, splits, thread, threads, is_last):
    """Store the fragments sums[count, 4] of a tile; the last of its blocks gets everybody's.

    thread of threads: those that have sums, the others give None. is_last: uint32 [1], not zero in
    the last block.
    """
    first = T.meta_var(tile * splits * count * threads + thread)
    if thread < threads:
        for f in unrolled(count):
            _store(first + (split * count + f) * threads, registers(sums, f * 4))
    is_last[0] = _arrive(tile, splits)
    if T.And(is_last[0] != T.uint32(0), thread < threads):
        for f in unrolled(count):
            for i in unrolled(4):
                sums[f * 4 + i] = T.float32(0)
        for other in range(splits):
            for f in unrolled(count):
                _add(first + (other * count + f) * threads, registers(sums, f * 4))

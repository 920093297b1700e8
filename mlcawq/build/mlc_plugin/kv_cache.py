"""TVM's paged KV cache with one of its kernels mended.

When a prompt goes on top of a cache, attention over the new tokens is merged with that over the
cached ones. TVM's kernel for GPUs (0.26 and 0.27) lets threads of a row read what others of it may
have overwritten already, unless the row is one subgroup: it is wrong for heads of more than 128
elements on CUDA, and for any on a GPU with narrow subgroups.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend.nn.llm import kv_cache
from tvm.target import Target

from tir_kernels import cpu, dispatch
from tir_kernels.foreign import with_root_block
from tir_kernels.gpu import merge_state


def install() -> None:
    """Give caches for targets that there are kernels for our merge_state."""
    theirs = kv_cache._merge_state_inplace

    def mended(heads: int, head_dim: int, dtype: str, target: Target, name: Any = None) -> Any:
        if not _is_gpu_of_ours(target):
            return theirs(heads, head_dim, dtype, target, name)
        function = with_root_block(merge_state(target, heads, head_dim, dtype))
        return function if name is None else function.with_attr("global_symbol", name)

    kv_cache._merge_state_inplace = mended


def _is_gpu_of_ours(target: Target) -> bool:
    try:
        return dispatch.kernels_for(target) is not cpu
    except NotImplementedError:
        return False

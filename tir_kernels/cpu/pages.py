"""The paged KV cache's memory: writing into pages, copying, moving and reading them.

Pages of a layer are [p, 2, kv_heads, PAGE, slot], keys before values; a slot's number counts
through pages. `stored` is that of `slots.Slots`, which says how a page is divided. Signatures are
those that TVM's paged KV cache calls.
"""

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.slots import PAGE, Slots
from tir_kernels.memo import memoized


@memoized
def append_to_pages(
    target: Target, kv_heads: int, head_dim: int, dtype: str, *, stored: str | None = None
) -> PrimFunc:
    """(pages, k [n, kv_heads, slot], v, positions int32 [n]): write row i into slot positions[i].

    -1 leaves a row out.
    """
    slots = Slots(head_dim, dtype, stored)
    size = slots.size
    copy = _slot_copy(slots)

    @T.prim_func(private=True, s_tir=True)
    def append(
        pages_handle: T.handle, k_handle: T.handle, v_handle: T.handle, positions_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int64()
        num_pages = T.int64()
        pages_at = T.int64()
        positions_at = T.int64()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, size), dtype, elem_offset=pages_at
        )
        k = T.match_buffer(k_handle, (n, kv_heads, size), dtype)
        v = T.match_buffer(v_handle, (n, kv_heads, size), dtype)
        positions = T.match_buffer(positions_handle, (n,), "int32", elem_offset=positions_at)
        cells = T.decl_buffer(
            (num_pages, 2, kv_heads, PAGE * size), dtype, data=pages.data, elem_offset=pages_at
        )
        for i in range(n):
            if positions[i] != -1:
                page: T.let[T.int32] = positions[i] // PAGE
                slot: T.let[T.int32] = positions[i] % PAGE
                for h in range(kv_heads):
                    copy(k, [i, h], -1, cells, [page, 0, h], slot)
                    copy(v, [i, h], -1, cells, [page, 1, h], slot)

    return append


@memoized
def copy_page(
    target: Target, kv_heads: int, head_dim: int, dtype: str, *, stored: str | None = None
) -> PrimFunc:
    """(pages, source int64, destination int64, tokens int64): a fork gets its own last page.

    Only the first `tokens` slots are copied.
    """
    slots = Slots(head_dim, dtype, stored)
    size = slots.size
    copy = _slot_copy(slots)

    @T.prim_func(private=True, s_tir=True)
    def copy_slots(pages_handle: T.handle, source: T.int64, destination: T.int64, tokens: T.int64):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        num_pages = T.int64()
        pages_at = T.int64()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, size), dtype, elem_offset=pages_at
        )
        cells = T.decl_buffer(
            (num_pages, 2, kv_heads, PAGE * size), dtype, data=pages.data, elem_offset=pages_at
        )
        for which, h in T.grid(2, kv_heads):
            for slot in range(tokens):
                copy(cells, [source, which, h], slot, cells, [destination, which, h], slot)

    return copy_slots


@memoized
def move_slots(
    target: Target, kv_heads: int, head_dim: int, dtype: str, *, stored: str | None = None
) -> PrimFunc:
    """(pages, indptr int32 [batch + 1], slots int32 [2, n], batch int32): move tokens together.

    Moves indptr[b] to indptr[b + 1] are sequence b's, from slots[0] to slots[1], one after the
    other: a destination may be a later move's source no more.
    """
    kept = Slots(head_dim, dtype, stored)
    size = kept.size
    copy = _slot_copy(kept)

    @T.prim_func(private=True, s_tir=True)
    def move(
        pages_handle: T.handle, indptr_handle: T.handle, slots_handle: T.handle, batch: T.int32
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        num_pages = T.int32()
        pages_at = T.int64()
        indptr_at = T.int32()
        slots_at = T.int32()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, size), dtype, elem_offset=pages_at
        )
        indptr = T.match_buffer(indptr_handle, (batch + 1,), "int32", elem_offset=indptr_at)
        slots = T.match_buffer(slots_handle, (2, n), "int32", elem_offset=slots_at)
        cells = T.decl_buffer(
            (num_pages, 2, kv_heads, PAGE * size), dtype, data=pages.data, elem_offset=pages_at
        )
        for i in range(indptr[batch]):
            source: T.let[T.int32] = slots[0, i]
            goal: T.let[T.int32] = slots[1, i]
            for which, h in T.grid(2, kv_heads):
                copy(
                    cells, [source // PAGE, which, h], source % PAGE,
                    cells, [goal // PAGE, which, h], goal % PAGE,
                )  # fmt: skip

    return move


@memoized
def read_slots(
    target: Target,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    stored: str | None = None,
) -> PrimFunc:
    """(pages, slots int32 [n], k [layers, n, kv_heads, slot], v, layer int64): what is cached."""
    kept = Slots(head_dim, dtype, stored)
    size = kept.size
    copy = _slot_copy(kept)

    @T.prim_func(private=True, s_tir=True)
    def read(
        pages_handle: T.handle,
        slots_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        layer: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int64()
        num_pages = T.int64()
        pages_at = T.int64()
        slots_at = T.int64()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, size), dtype, elem_offset=pages_at
        )
        slots = T.match_buffer(slots_handle, (n,), "int32", elem_offset=slots_at)
        k = T.match_buffer(k_handle, (layers, n, kv_heads, size), dtype)
        v = T.match_buffer(v_handle, (layers, n, kv_heads, size), dtype)
        cells = T.decl_buffer(
            (num_pages, 2, kv_heads, PAGE * size), dtype, data=pages.data, elem_offset=pages_at
        )
        for i in range(n):
            page: T.let[T.int32] = slots[i] // PAGE
            slot: T.let[T.int32] = slots[i] % PAGE
            for h in range(kv_heads):
                copy(cells, [page, 0, h], slot, k, [layer, i, h], -1)
                copy(cells, [page, 1, h], slot, v, [layer, i, h], -1)

    return read


def _slot_copy(slots: Slots) -> Any:
    """TIR (x, x_at, x_slot, y, y_at, y_slot): a slot of x[*x_at] goes to one of y[*y_at].

    A slot of -1: there is one only, its numbers before its scale; others are those of a page.
    """
    packed, scale_size = slots.packed, slots.scale_size

    def numbers(slot: Any) -> Any:
        return 0 if isinstance(slot, int) else slot * packed

    def scale(slot: Any) -> Any:
        return packed if isinstance(slot, int) else slots.scale_in_page(slot)

    @T.inline
    def copy(x, x_at, x_slot, y, y_at, y_slot):
        for j in T.vectorized(packed):
            T.buffer_store(
                y, T.BufferLoad(x, [*x_at, numbers(x_slot) + j]), [*y_at, numbers(y_slot) + j]
            )
        for j in range(scale_size):
            T.buffer_store(
                y, T.BufferLoad(x, [*x_at, scale(x_slot) + j]), [*y_at, scale(y_slot) + j]
            )

    return copy

"""Attention of many queries on tensor cores (FlashAttention-2, arXiv 2307.08691).

A block has 64 rows (`gpu.attention_entries`), 16 to a warp: a warp's queries stay in registers as
fragments of A, and what the scores leave in the accumulators is, packed in pairs, the A fragments
of the weights that the values are multiplied with. Keys and values come through shared memory by
asynchronous copies, 64 at a time: values are on their way while the scores are computed, the next
keys while the softmax and the weighted values are. Rows in shared memory are an odd number of 16
bytes apart, which keeps the matrices of ldmatrix in different banks.

The weights are rounded to 16 bits for the second product; all sums are fp32.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cuda import device
from tir_kernels.cuda.device import DeviceFunction
from tir_kernels.gpu import attention_prefill as without_tensor_cores
from tir_kernels.gpu.attention_entries import paged_prefill, ragged_prefill
from tir_kernels.gpu.attention_parts import HIDDEN, LOG2_E, NOTHING, TINY
from tir_kernels.memo import memoized

WARPS = 4
ROWS = 16 * WARPS
KEYS = 64  # that are scored together
LONGEST = 128  # head_dim that registers hold the sums of
_CHUNK = 8  # elements of 16 bytes, the vectors that keys and values come in

# The largest and the sum of a value of the four lanes that share a row of an accumulator.
_quad_max = DeviceFunction(
    "tir_quad_max",
    "float* value",
    """
  value[0] = fmaxf(value[0], __shfl_xor_sync(0xffffffffu, value[0], 1));
  value[0] = fmaxf(value[0], __shfl_xor_sync(0xffffffffu, value[0], 2));
""",
    portable=True,
)
_quad_sum = DeviceFunction(
    "tir_quad_sum",
    "float* value",
    """
  value[0] += __shfl_xor_sync(0xffffffffu, value[0], 1);
  value[0] += __shfl_xor_sync(0xffffffffu, value[0], 2);
""",
    portable=True,
)


@memoized
def attention_prefill_ragged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the new keys and values of the same sequences, causal if asked.

    q [n, q_heads, d]; k, v [n, kv_heads, d]; sequence b has rows q_indptr[b] to q_indptr[b + 1].
    """
    shape = q_heads, kv_heads, head_dim, dtype
    if not _fits(head_dim, dtype):
        return without_tensor_cores.attention_prefill_ragged(target, *shape)
    attend = _attend(head_dim, q_heads // kv_heads, dtype)
    return ragged_prefill(target, *shape, ROWS, 32 * WARPS, attend)


@memoized
def attention_prefill_paged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the pages that their sequences already have.

    pages [p, 2, kv_heads, PAGE, d]; sequence b owns page_values[page_indptr[b]..], of which the
    last holds last_page_length[b] tokens.
    """
    shape = q_heads, kv_heads, head_dim, dtype
    if not _fits(head_dim, dtype):
        return without_tensor_cores.attention_prefill_paged(target, *shape)
    attend = _attend(head_dim, q_heads // kv_heads, dtype)
    return paged_prefill(target, *shape, ROWS, 32 * WARPS, attend)


def _fits(head_dim: int, dtype: str) -> bool:
    return head_dim % 16 == 0 and head_dim <= LONGEST and dtype in ("float16", "bfloat16")


def _attend(d: int, group: int, dtype: str):
    """TIR for one block: rows `first_row`... of a sequence, for the heads of one key head."""
    threads = 32 * WARPS
    pitch = d + _CHUNK
    copies = KEYS * d // _CHUNK // threads
    steps, columns, tiles = d // 16, d // 8, KEYS // 8
    multiply = device.mma(dtype)

    @T.inline
    def copy(t, first, length, vector, shared):
        """Ask for a tile of keys or values; what lies past the last is zero."""
        for i in range(copies):
            chunk = T.meta_var(i * threads + t)
            row = T.meta_var(T.truncdiv(chunk, d // _CHUNK))
            v = T.meta_var(T.truncmod(chunk, d // _CHUNK))
            device.copy_async(
                device.shared_address(shared, row * pitch + v * _CHUNK),
                T.address_of(vector(T.min(first + row, length - 1), v)),
                T.Select(first + row < length, 16, 0),
            )
        device.commit_copies()

    @T.inline
    def score(lane, queries, k_shared, scores):
        keys = T.alloc_buffer((4,), "uint32", scope="local")
        for i in T.unroll(tiles * 4):
            scores[i] = T.float32(0)
        for s in T.unroll(steps):
            for pair in T.unroll(tiles // 2):
                row = T.meta_var(pair * 16 + lane // 16 * 8 + lane % 8)
                column = T.meta_var(s * 16 + lane // 8 % 2 * 8)
                device.ldmatrix(4)(
                    device.registers(keys, 0),
                    device.shared_address(k_shared, row * pitch + column),
                )
                for half in T.unroll(2):
                    multiply(
                        device.registers(scores, (pair * 2 + half) * 4),
                        device.registers(queries, s * 4),
                        device.registers(keys, half * 2),
                    )

    @T.inline
    def hide(lane, visible, scores):
        """visible: how many keys of the tile each of the lane's two rows sees."""
        for n in T.unroll(tiles):
            for i in T.unroll(4):
                if n * 8 + lane % 4 * 2 + i % 2 >= visible[i // 2]:
                    scores[n * 4 + i] = T.float32(HIDDEN)

    @T.inline
    def soften(scale, scores, largest, total, mixed):
        """Scores become weights, and the sums so far follow the running maximum."""
        new = T.alloc_buffer((2,), "float32", scope="local")
        for h in T.unroll(2):
            new[h] = largest[h]
        for n in T.unroll(tiles):
            for i in T.unroll(4):
                scores[n * 4 + i] = scores[n * 4 + i] * scale
                new[i // 2] = T.max(new[i // 2], scores[n * 4 + i])
        for h in T.unroll(2):
            _quad_max(device.registers(new, h))
            largest[h] = T.exp2(largest[h] - new[h])
            total[h] = total[h] * largest[h]
        for n in T.unroll(columns):
            for i in T.unroll(4):
                mixed[n * 4 + i] = mixed[n * 4 + i] * largest[i // 2]
        for n in T.unroll(tiles):
            for i in T.unroll(4):
                scores[n * 4 + i] = T.exp2(scores[n * 4 + i] - new[i // 2])
                total[i // 2] = total[i // 2] + scores[n * 4 + i]
        for h in T.unroll(2):
            largest[h] = new[h]

    @T.inline
    def gather(lane, scores, v_shared, mixed):
        rounded = T.alloc_buffer((8,), dtype, scope="local")
        weights = T.alloc_buffer((4,), "uint32", scope="local")
        values = T.alloc_buffer((4,), "uint32", scope="local")
        for s in T.unroll(KEYS // 16):
            for i in T.unroll(8):
                rounded[i] = T.Cast(dtype, scores[s * 8 + i])
            device.pack(device.registers(weights, 0), device.registers(rounded, 0))
            for pair in T.unroll(columns // 2):
                row = T.meta_var(s * 16 + lane // 8 % 2 * 8 + lane % 8)
                column = T.meta_var(pair * 16 + lane // 16 * 8)
                device.ldmatrix(4, transposed=True)(
                    device.registers(values, 0),
                    device.shared_address(v_shared, row * pitch + column),
                )
                for half in T.unroll(2):
                    multiply(
                        device.registers(mixed, (pair * 2 + half) * 4),
                        device.registers(weights, 0),
                        device.registers(values, half * 2),
                    )

    @T.inline
    def attend(
        t, q_row, q_length, first_row, head, kv_length, causal, sm_scale, q, key, value, out, lse
    ):
        k_shared = T.alloc_buffer((KEYS * pitch,), dtype, scope="shared")
        v_shared = T.alloc_buffer((KEYS * pitch,), dtype, scope="shared")
        queries = T.alloc_buffer((steps * 4,), "uint32", scope="local")
        scores = T.alloc_buffer((tiles * 4,), "float32", scope="local")
        mixed = T.alloc_buffer((columns * 4,), "float32", scope="local")
        largest = T.alloc_buffer((2,), "float32", scope="local")
        total = T.alloc_buffer((2,), "float32", scope="local")
        visible = T.alloc_buffer((2,), "int32", scope="local")
        lane = T.meta_var(t % 32)
        pairs = T.decl_buffer((q.shape[0], q.shape[1], d // 2), "uint32", data=q.data)
        last_row = T.meta_var(q_length * group - 1)
        row = T.meta_var(lambda h: first_row + t // 32 * 16 + lane // 4 + h * 8)
        # A query sees the keys before it: those of the past and its own chunk's.
        past = T.meta_var(kv_length - q_length)
        last_query = T.meta_var(T.truncdiv(T.min(first_row + ROWS - 1, last_row), group))
        seen: T.let[T.int32] = T.Select(
            first_row > last_row,
            0,
            T.Select(causal != 0, T.min(kv_length, past + last_query + 1), kv_length),
        )
        seen_by_all: T.let[T.int32] = T.Select(
            causal != 0, past + T.truncdiv(first_row, group) + 1, kv_length
        )
        if seen > 0:
            copy(t, 0, kv_length, key, k_shared)
        for h in T.unroll(2):
            # Rows past the last repeat it, and are not stored.
            mine: T.let[T.int32] = T.max(T.min(row(h), last_row), 0)
            query: T.let[T.int32] = q_row + T.truncdiv(mine, group)
            at_head: T.let[T.int32] = head * group + T.truncmod(mine, group)
            for s in T.unroll(steps):
                for part in T.unroll(2):
                    queries[s * 4 + part * 2 + h] = pairs[
                        query, at_head, s * 8 + part * 4 + lane % 4
                    ]
            largest[h] = T.float32(NOTHING)
            total[h] = T.float32(0)
        for i in T.unroll(columns * 4):
            mixed[i] = T.float32(0)
        for step in range(T.truncdiv(seen + (KEYS - 1), KEYS)):
            first: T.let[T.int32] = step * KEYS
            device.wait_copies(0)()
            T.tvm_storage_sync("shared")
            copy(t, first, kv_length, value, v_shared)
            score(lane, queries, k_shared, scores)
            device.wait_copies(0)()
            T.tvm_storage_sync("shared")
            if first + KEYS < seen:
                copy(t, first + KEYS, kv_length, key, k_shared)
            if first + KEYS > T.min(seen_by_all, kv_length):
                for h in T.unroll(2):
                    visible[h] = (
                        T.Select(
                            causal != 0,
                            T.min(kv_length, past + T.truncdiv(row(h), group) + 1),
                            kv_length,
                        )
                        - first
                    )
                hide(lane, visible, scores)
            soften(sm_scale * T.float32(LOG2_E), scores, largest, total, mixed)
            gather(lane, scores, v_shared, mixed)
        for h in T.unroll(2):
            _quad_sum(device.registers(total, h))
            total[h] = total[h] + T.float32(TINY)
            inverse: T.let[T.float32] = T.float32(1) / total[h]
            if row(h) <= last_row:
                query: T.let[T.int32] = q_row + T.truncdiv(row(h), group)
                at_head: T.let[T.int32] = head * group + T.truncmod(row(h), group)
                for n in T.unroll(columns):
                    for i in T.vectorized(2):
                        out[query, at_head, n * 8 + lane % 4 * 2 + i] = T.Cast(
                            dtype, mixed[n * 4 + h * 2 + i] * inverse
                        )
                if lane % 4 == 0:
                    lse[query, at_head] = largest[h] + T.log2(total[h])

    return attend

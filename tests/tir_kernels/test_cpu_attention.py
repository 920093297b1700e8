"""Attention and small kernels of the CPU, on each level of instruction sets that runs here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.tir_kernels.backends import Backend, Random
from tests.tir_kernels.int8_slots import Stored
from tests.tir_kernels.kernels import (
    Kernel,
    on_threads,
    poisoned,
    relative_error,
    targets_that_run_here,
)
from tests.tir_kernels.test_attention import Pages, check_decode, check_paged, check_ragged
from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.attention_decode import attention_decode_paged
from tir_kernels.cpu.lanes import fold, sum_parts, sum_whole, transpose
from tir_kernels.cpu.merge_state import merge_state
from tir_kernels.cpu.pages import append_to_pages, copy_page, move_slots, read_slots
from tir_kernels.cpu.rotary import split_rotary
from tir_kernels.cpu.slots import INT8, Slots

TARGETS = targets_that_run_here()
LENGTHS = [1, 15, 16, 17, 0, 1000, 256, 257]
# Heads, key heads, head_dim: all that models have, groups of 1, 3, 4, 7, 8 and more.
SHAPES = [
    (1, 1, 64),
    (3, 3, 80),
    (8, 2, 128),
    (14, 2, 64),
    (8, 1, 96),
    (4, 2, 256),
    (12, 1, 32),
    (6, 2, 112),
    (3, 1, 20),
]
INT8_SHAPES = [(7, 1, 64, "float16"), (2, 2, 80, "float16"), (4, 2, 128, "float32")]


@pytest.fixture(params=TARGETS)
def level(request: pytest.FixtureRequest) -> Backend:
    return Backend("cpu", TARGETS[request.param])


def best() -> Backend:
    return Backend("cpu", list(TARGETS.values())[-1])


def test_decode(level: Backend, rng: Random) -> None:
    check_decode(level, 14, 2, 64, "float16", LENGTHS, rng)


def test_prefill(rng: Random) -> None:
    check_ragged(best(), 7, 1, 64, "float16", [1, 15, 17, 150], rng)
    check_paged(best(), 7, 1, 64, "float16", [17, 0, 300, 1000], [3, 7, 40, 1], rng)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_decode_on_any_number_of_threads(
    heads: int, kv_heads: int, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits: who computes what is no matter of how."""
    target, d, lengths = best().target, 64, [2064, 0, 300, 16, 1]
    tables = Pages(lengths, kv_heads, rng, Stored(d, "float16", None)).tables
    q = rng.floats(len(lengths), heads, d, dtype="float16")
    kernel = Kernel(attention_decode_paged(target, heads, kv_heads, d, "float16"), target)

    def attended() -> list[np.ndarray]:
        out = poisoned(q.shape, "float16")
        lse = poisoned(q.shape[:2], "float32")
        positions = np.zeros(len(lengths), np.int32)
        kernel(q, *tables, positions, out, lse, 0, 1.0, 1e4, d**-0.5)
        return [out, lse]

    want = on_threads(1, attended, monkeypatch)
    for count in (2, 3, 7):
        for found, exact in zip(on_threads(count, attended, monkeypatch), want, strict=True):
            np.testing.assert_array_equal(found, exact, err_msg=str(rng.seed))
    assert all(np.isfinite(values).all() for values in want)


def test_decode_of_int8_slots(level: Backend, rng: Random) -> None:
    check_decode(level, 14, 2, 64, "float16", LENGTHS, rng, INT8)


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dtype"), INT8_SHAPES)
def test_prefill_of_int8_slots(heads: int, kv_heads: int, d: int, dtype: str, rng: Random) -> None:
    check_ragged(best(), heads, kv_heads, d, dtype, [1, 15, 17, 150], rng, INT8)
    check_paged(best(), heads, kv_heads, d, dtype, [17, 0, 300], [3, 7, 40], rng, INT8)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, INT8])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SHAPES)
def test_more_shapes(
    level: Backend, heads: int, kv_heads: int, d: int, stored: str | None, rng: Random
) -> None:
    shape = heads, kv_heads, d, "float16"
    check_decode(level, *shape, LENGTHS, rng, stored)
    check_ragged(level, *shape, [1, 15, 16, 17, 300], rng, stored)
    check_paged(level, *shape, [5, 0, 150, 1000], [3, 7, 40, 100], rng, stored)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, INT8])
def test_fp32(level: Backend, stored: str | None, rng: Random) -> None:
    check_decode(level, 6, 2, 64, "float32", LENGTHS, rng, stored)
    check_ragged(level, 6, 2, 64, "float32", [1, 15, 17, 300], rng, stored)


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dtype"), INT8_SHAPES)
def test_splitting_into_int8_slots(
    heads: int, kv_heads: int, d: int, dtype: str, rng: Random
) -> None:
    """The same rotation; keys and values are what numpy packs of it."""
    target, rows, stored = best().target, 9, Stored(d, dtype, INT8)
    qkv = rng.floats(rows, heads + 2 * kv_heads, d, dtype=dtype)
    qkv[3, heads:, : d // 2] = 0  # groups without a scale
    positions = rng.integers(0, 5000, rows).astype(np.int32)
    frequencies = (1 / 1e4 ** (np.arange(0, d, 2) / d)).astype(np.float32)
    want = [poisoned((rows, count, d), dtype) for count in (heads, kv_heads, kv_heads)]
    shape = heads, kv_heads, d, dtype, 1.0
    Kernel(split_rotary(target, *shape), target)(qkv, positions, *want, frequencies)
    q = stored.outputs(rows, heads)[0]
    slots = [poisoned((rows, kv_heads, stored.size), dtype) for _ in range(2)]
    Kernel(split_rotary(target, *shape, stored=INT8), target)(
        stored.fused(qkv, kv_heads), positions, q, *slots, frequencies
    )
    np.testing.assert_array_equal(stored.real(q, heads, d), want[0])
    for found, exact in zip(slots, want[1:], strict=True):
        np.testing.assert_array_equal(found.view(np.uint8), stored.packed(exact).view(np.uint8))
        assert relative_error(stored.unpacked(found), exact) < 1e-2, rng.seed


@pytest.mark.parametrize(("d", "dtype"), [(64, "float16"), (20, "float16"), (80, "float32")])
def test_pages_of_int8_slots(d: int, dtype: str, rng: Random) -> None:
    """Written, copied, moved and read, with nothing else touched."""
    target, heads, stored = best().target, 3, Stored(d, dtype, INT8)
    slots = stored.packed(rng.floats(4, 2, heads, 16, d, dtype=dtype))
    pages = stored.pages(slots)
    k, v = (stored.packed(rng.floats(4, heads, d, dtype=dtype)) for _ in range(2))

    def check() -> None:
        want = stored.pages(slots)
        np.testing.assert_array_equal(pages.view(np.uint8), want.view(np.uint8))

    append = append_to_pages(target, heads, d, dtype, **stored.options)
    Kernel(append, target)(pages, k, v, np.array([5, -1, 40, 0], np.int32))
    for row, slot in ((0, 5), (2, 40), (3, 0)):
        slots[slot // 16, :, :, slot % 16] = k[row], v[row]
    check()
    Kernel(copy_page(target, heads, d, dtype, **stored.options), target)(pages, 1, 3, 5)
    slots[3, :, :, :5] = slots[1, :, :, :5]
    check()
    moves = np.array([[7, 20, 22], [3, 19, 20]], np.int32)
    move = move_slots(target, heads, d, dtype, **stored.options)
    Kernel(move, target)(pages, np.array([0, 1, 3], np.int32), moves, 2)
    for source, goal in moves.T:
        slots[goal // 16, :, :, goal % 16] = slots[source // 16, :, :, source % 16]
    check()
    found = [poisoned((2, 3, heads, stored.size), dtype) for _ in range(2)]
    read = read_slots(target, 2, heads, d, dtype, **stored.options)
    Kernel(read, target)(pages, np.array([0, 40, 5], np.int32), *found, 1)
    for which, given in enumerate((k, v)):
        np.testing.assert_array_equal(
            found[which][1].view(np.uint8), given[[3, 2, 0]].view(np.uint8)
        )


def test_slots_of_what_is_no_number(rng: Random) -> None:
    """An infinity among keys comes out of attention as NaN, and is not hidden by rounding."""
    target, stored = best().target, Stored(32, "float16", INT8)
    qkv = rng.floats(1, 3, 32)
    qkv[0, 2, 5] = np.inf
    q, k, v = stored.outputs(1, 1)[0], *(poisoned((1, 1, stored.size), "float16") for _ in "kv")
    Kernel(split_rotary(target, 1, 1, 32, "float16", 1.0, stored=INT8), target)(
        stored.fused(qkv, 1), np.zeros(1, np.int32), q, k, v, np.ones(16, np.float32)
    )
    assert np.isfinite(stored.unpacked(k)).all()
    assert not np.isfinite(stored.unpacked(v)).any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_the_cache_sees_is_there(dtype: str) -> None:
    """The heads that it takes have room for the real ones, and are within the fused q, k, v."""
    for d, q_heads, kv_heads in itertools.product(range(12, 260, 4), (1, 3, 14, 32), (1, 2, 8)):
        slots = Slots(d, dtype, INT8)
        seen = slots.heads(q_heads)
        assert q_heads * d <= seen * slots.size
        assert (seen + 2 * kv_heads) * slots.size <= (q_heads + 2 * kv_heads) * d
        assert seen >= q_heads
    for d in (8, 18):
        with pytest.raises(NotImplementedError, match=str(d)):
            Slots(d, dtype, INT8)


def test_merging_over_int8_slots(rng: Random) -> None:
    target, (n, heads, d) = best().target, (5, 6, 64)
    stored = Stored(d, "float16", INT8)
    states = [(rng.floats(n, heads, d), rng.floats(n, heads, dtype="float32")) for _ in range(2)]
    want = [x.copy() for state in states for x in state]
    Kernel(merge_state(target, heads, d, "float16"), target)(*want)
    found = []
    for out, lse in states:
        seen = stored.outputs(n, heads)
        stored.real(seen[0], heads, d)[:] = out
        stored.real(seen[1], heads)[:] = lse
        found += seen
    Kernel(merge_state(target, heads, d, "float16", stored=INT8), target)(*found)
    np.testing.assert_array_equal(stored.real(found[0], heads, d), want[0])
    np.testing.assert_array_equal(stored.real(found[1], heads), want[1])


def test_prefill_is_as_accurate_as_its_storage(rng: Random) -> None:
    """Large scores, where a weight in one bfloat16 would be off by its 2^-9."""
    n, d = 200, 64
    q, k, v = (rng.floats(n, 1, d) for _ in range(3))
    q *= 4
    at = np.array([0, n], np.int32)
    out, lse = poisoned((n, 1, d), "float16"), poisoned((n, 1), "float32")
    backend = best()
    kernel = backend.compile(
        backend.kernels.attention_prefill_ragged(backend.target, 1, 1, d, "float16")
    )
    unused = np.zeros(n, np.int32), np.zeros(1, np.int32)
    kernel(q, at, k, v, at, *unused, out, lse, 0, 0, 1.0, 1e4, d**-0.5)
    scores = q[:, 0].astype(np.float64) @ k[:, 0].astype(np.float64).T * d**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ v[:, 0].astype(np.float64)
    rounding = relative_error(want.astype(np.float16), want)
    assert relative_error(out[:, 0], want) < 1.2 * rounding, rng.seed


def lane_kernel(lanes: int) -> PrimFunc:
    """(x [lanes, lanes], its rows' sums, its rows' maxima in every lane, its transpose)."""
    part = min(4, lanes)
    half = lanes // 2
    every = T.ramp(0, 1, lanes)
    add_parts, add_whole = sum_parts(lanes), sum_whole(lanes)
    largest, turn = fold(lanes, T.max), transpose(lanes)

    @T.prim_func(private=True, s_tir=True)
    def work(
        x: T.Buffer((lanes, lanes), "float32"),
        sums: T.Buffer((lanes,), "float32"),
        maxima: T.Buffer((lanes, lanes), "float32"),
        turned: T.Buffer((lanes, lanes), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        rows = T.alloc_buffer((part, lanes), "float32")
        parts = T.alloc_buffer((lanes // part, lanes), "float32")
        upper = T.alloc_buffer((half, lanes), "float32")
        lower = T.alloc_buffer((half, lanes), "float32")
        for n in T.unroll(lanes // part):
            for i in T.unroll(part):
                rows[i, every] = x[n * part + i, every]
            add_parts(rows)
            parts[n, every] = rows[0, every]
        add_whole(parts)
        sums[every] = parts[0, every]
        for i in range(lanes):
            maxima[i, every] = x[i, every]
            largest(maxima, i)
        for i in T.unroll(half):
            upper[i, every] = x[i, every]
            lower[i, every] = x[half + i, every]
        turn(upper, lower)
        for i in T.unroll(half):
            turned[i, every] = upper[i, every]
            turned[half + i, every] = lower[i, every]

    return work


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_lanes(lanes: int, rng: Random) -> None:
    x = rng.floats(lanes, lanes, dtype="float32")
    sums = poisoned((lanes,), "float32")
    maxima, turned = poisoned(x.shape, "float32"), poisoned(x.shape, "float32")
    Kernel(lane_kernel(lanes), best().target)(x, sums, maxima, turned)
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-4, atol=1e-5, err_msg=str(rng.seed))
    np.testing.assert_array_equal(maxima, np.repeat(x.max(1)[:, None], lanes, 1))
    np.testing.assert_array_equal(turned, x.T)


@pytest.mark.parametrize("target", [pytest.param(t, id=name) for name, t in TARGETS.items()])
def test_sines_of_large_angles(target: Target, rng: Random) -> None:
    """With q = (1, 0, ...) and frequencies of one radian, what comes out is cos and sin."""
    positions = rng.integers(0, 500_000, 300).astype(np.int32)
    qkv = np.zeros((300, 3, 8), np.float32)
    qkv[:, :, :4] = 1
    q, k, v = (poisoned((300, 1, 8), "float32") for _ in range(3))
    frequencies = np.array([1, 0.5, 1e-3, 0.99], np.float32)
    Kernel(split_rotary(target, 1, 1, 8, "float32", 1.0), target)(
        qkv, positions, q, k, v, frequencies
    )
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    want = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(q[:, 0], want, atol=1e-6, err_msg=str(rng.seed))
    np.testing.assert_allclose(k[:, 0], want, atol=1e-6, err_msg=str(rng.seed))

"""4-bit experts against the numpy reference, on every target: random routing and its extremes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tir_kernels.backends import Backend, Random, backend_named
from tests.tir_kernels.kernels import HOST, poisoned, relative_error
from tir_kernels import dispatch, reference
from tir_kernels._tvm import Target
from tir_kernels.vulkan import limits

TOLERANCE = {"float16": 2e-3, "bfloat16": 8e-3, "float32": 2e-5}
CASES = [
    # experts, K, N, group
    (8, 128, 72, 32),
    (5, 192, 40, 64),
    (3, 256, 264, 128),
]


def weights_of(rng: Random, experts: int, K: int, N: int, group: int, dtype: str) -> list[Any]:
    bits = rng.integers(0, 2**32, (experts, K + K // group, N // 8), dtype=np.uint32)
    scales = (rng.random((experts, K // group, N)) * 0.02 + 0.001).astype(dtype)
    qweight, qzeros = bits.view(np.int32)[:, :K], bits.view(np.int32)[:, K:]
    return [np.ascontiguousarray(qweight), np.ascontiguousarray(qzeros), scales]


def indptr_of(counts: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def routings(rng: Random, experts: int, most: int) -> Iterator[np.ndarray]:
    """Rows of each expert: one row, few and many at random, and as uneven as can be."""
    for m in (1, 2, experts, 2 * experts + 3, most):
        yield rng.multinomial(m, rng.dirichlet(np.full(experts, 0.5)))
    for expert in (0, experts // 2, experts - 1):
        yield np.where(np.arange(experts) == expert, most // 2 + 1, 0)
    # Nobody in the middle; a lone row at either end.
    yield np.where(np.isin(np.arange(experts), (0, experts - 1)), 1, 0)
    yield np.full(experts, 17)


def check_grouped(
    backend: Backend, rng: Random, case: tuple[int, ...], dtype: str, most: int
) -> None:
    experts, K, N, _ = case
    function = dispatch.w4a16_experts_grouped(
        backend.target, *case, dtype, scale_dtype=scale_dtype(backend, dtype)
    )
    kernel = backend.compile(function)
    weights = weights_of(rng, *case, scale_dtype(backend, dtype))
    for counts in routings(rng, experts, most):
        x = rng.floats(counts.sum(), K, dtype=dtype)
        out = poisoned((len(x), N), dtype)
        kernel(x, indptr_of(counts), *weights, out)
        owners = np.repeat(np.arange(experts), counts)
        error = relative_error(out, reference.w4a16_experts(x, owners, *weights))
        assert error < TOLERANCE[dtype], (counts, error, rng.seed)


def check_decode(
    backend: Backend, rng: Random, case: tuple[int, ...], dtype: str, x_rows: int, rows: int
) -> None:
    experts, K, N, _ = case
    function = dispatch.w4a16_experts_decode(
        backend.target,
        *case,
        dtype,
        x_rows=x_rows,
        rows=rows,
        scale_dtype=scale_dtype(backend, dtype),
    )
    kernel = backend.compile(function)
    weights = weights_of(rng, *case, scale_dtype(backend, dtype))
    last_and_first = np.arange(experts)[::-1][:rows]
    for chosen in (rng.permutation(experts)[:rows], last_and_first, np.zeros(rows, int)):
        x = rng.floats(x_rows, K, dtype=dtype)
        out = poisoned((rows, N), dtype)
        kernel(x, chosen.astype(np.int32)[None], *weights, out)
        rows_of_x = np.broadcast_to(x, (rows, K))
        error = relative_error(out, reference.w4a16_experts(rows_of_x, chosen, *weights))
        assert error < TOLERANCE[dtype], (chosen, error, rng.seed)


def scale_dtype(backend: Backend, dtype: str) -> str:
    """That of the activations, as mlc_llm has it, where the target's kernels know it."""
    return "float16" if backend.name == "cuda" else dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped(backend: Backend, rng: Random, case: tuple[int, ...]) -> None:
    check_grouped(backend, rng, case, "float16", 70 * case[0])


@pytest.mark.parametrize(("x_rows", "rows"), [(1, 2), (3, 3)])
def test_decode(backend: Backend, rng: Random, x_rows: int, rows: int) -> None:
    check_decode(backend, rng, CASES[x_rows // 3], "float16", x_rows, rows)


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (60, 3)])
def test_expert_sums(backend: Backend, rng: Random, experts: int, chosen: int) -> None:
    kernel = backend.compile(backend.kernels.expert_sums(backend.target, experts, chosen))
    for n in (1, 2, 7, 255, 256, 300, 1025):
        indices = rng.random((n, experts)).argsort(axis=1)[:, :chosen].astype(np.int32)
        sums = np.full(experts * n, -1, np.int32)
        kernel(indices, sums)
        goes = (indices[:, :, None] == np.arange(experts)).any(axis=1)
        assert (sums == goes.T.ravel().cumsum()).all(), (n, rng.seed)


@pytest.mark.parametrize("name", ["cpu", "vulkan"])
def test_float32(name: str, rng: Random) -> None:
    backend = backend_named(name)
    check_grouped(backend, rng, (4, 96, 56, 32), "float32", 100)
    check_decode(backend, rng, (4, 96, 56, 32), "float32", 1, 3)


def test_weights_larger_than_a_binding_go_in_parts(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_named("vulkan")
    case = (7, 256, 128, 32)
    _, K, N, _ = case
    # Two experts each, the last one alone.
    monkeypatch.setattr(limits, "BINDING_BYTES", 3 * K * N // 2)
    check_grouped(backend, rng, case, "float16", 200)
    check_decode(backend, rng, case, "float16", 1, 4)
    vulkan = Target({"kind": "vulkan", "max_storage_buffer_range": 3 * K * N // 2})
    with pytest.raises(NotImplementedError, match="cannot be split"):
        dispatch.w4a16_experts_grouped(vulkan, *case)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [("sm_75", "float16"), ("sm_90", "bfloat16")])
def test_other_architectures(rng: Random, arch: str, dtype: str) -> None:
    target = Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
    backend = replace(backend_named("cuda"), target=target)
    for case in CASES:
        check_grouped(backend, rng, case, dtype, 70 * case[0])
        check_decode(backend, rng, case, dtype, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("experts", "factor", "N"), [(1, 1, 8), (2, 3, 24), (17, 5, 200), (60, 2, 176), (128, 4, 96)]
)
def test_many_shapes(
    backend: Backend, rng: Random, experts: int, factor: int, N: int, group: int
) -> None:
    case = (experts, group * factor, N, group)
    check_grouped(backend, rng, case, "float16", 64 if backend.name == "cuda" else 70 * experts)
    check_decode(backend, rng, case, "float16", 1, min(experts, 8))


def test_refusals() -> None:
    with pytest.raises(NotImplementedError, match="metal"):
        dispatch.w4a16_experts_grouped(Target("metal"), 4, 64, 8, 32)
    with pytest.raises(ValueError, match="group size"):
        dispatch.w4a16_experts_grouped(HOST, 4, 64, 8, 16)
    with pytest.raises(ValueError, match="0 experts are too few"):
        dispatch.w4a16_experts_grouped(HOST, 0, 64, 8, 32)
    with pytest.raises(ValueError, match="2 rows of x for 3"):
        dispatch.w4a16_experts_decode(HOST, 4, 64, 8, 32, x_rows=2, rows=3)
    with pytest.raises(ValueError, match="scale dtype"):
        dispatch.w4a16_experts_decode(HOST, 4, 64, 8, 32, x_rows=1, rows=3, scale_dtype="int8")

"""Relax's virtual machine on the WebGPU device: planned memory, and TVM's paged KV cache."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.s_tir import dlight as dl
from wgpu_for_tests import Random, needs_vulkan

from mlcawq.engine import wgpu

pytestmark = needs_vulkan

HEADS, HEAD_DIM, PAGE = 4, 64, 16
POOLED = 2  # TVM's allocator that keeps what it has freed


class Attention(nn.Module):
    """Attention over a paged cache and nothing else; qkv [1, n, 3 * HEADS, HEAD_DIM]."""

    def attend(self, qkv: nn.Tensor, cache: PagedKVCache) -> tuple[nn.Tensor, PagedKVCache]:
        return cache.attention_with_fused_qkv(0, qkv, HEADS, sm_scale=HEAD_DIM**-0.5), cache

    def create_cache(
        self,
        max_batch_size: tvm.tirx.Var,
        max_total_seq_len: tvm.tirx.Var,
        prefill_chunk_size: tvm.tirx.Var,
        page_size: tvm.tirx.Var,
        support_sliding_window: tvm.tirx.Var,
    ) -> PagedKVCache:
        return TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=relax.ShapeExpr([0, 1]),
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            qk_head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=HEAD_DIM,
            enable_disaggregation=False,
            dtype="float32",
            target=tvm.target.Target.current(),
        )

    def spec(self) -> dict:
        sizes = (
            "max_batch_size",
            "max_total_seq_len",
            "prefill_chunk_size",
            "page_size",
            "support_sliding_window",
        )
        plain = {"param_mode": "none", "effect_mode": "none"}
        return {
            "attend": {
                "qkv": nn.spec.Tensor([1, "n", 3 * HEADS, HEAD_DIM], "float32"),
                "cache": nn.spec.Object(object_type=PagedKVCache),
                "$": plain,
            },
            "create_cache": {**dict.fromkeys(sizes, int), "$": plain},
        }


def machine(module: tvm.IRModule) -> relax.VirtualMachine:
    target = tvm.target.Target("webgpu", host="llvm")
    with target:
        built = relax.build(module, target)
    devices = [tvm.device("webgpu", 0), tvm.cpu(0)]
    return relax.VirtualMachine(built, devices, memory_cfg="pooled")


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal: the last query sees every key. q [m, h, d], k and v [n, h, d]."""
    m, n = len(q), len(k)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("mhd,nhd->hmn", q, k) * HEAD_DIM**-0.5
    scores[:, np.arange(n)[None, :] > np.arange(n - m, n)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hmn,nhd->mhd", weights, v)


@pytest.fixture(scope="module")
def device() -> tvm.runtime.Device:
    wgpu.load()
    return tvm.device("webgpu", 0)


def test_paged_cache_of_two_sequences(device) -> None:
    """Prompts of different lengths, then tokens for both at once, over several pages."""
    target = tvm.target.Target("webgpu", host="llvm")
    with target:
        attend = Attention()
        module, _ = attend.export_tvm(spec=attend.spec())
    vm = machine(module)
    random = Random()
    sizes = (2, 256, 64, PAGE, 0)
    cache = vm["create_cache"](*(tvm_ffi.Shape([size]) for size in sizes))
    kv = {
        name: tvm.get_global_func(f"vm.builtin.kv_state_{name}")
        for name in ("add_sequence", "begin_forward", "end_forward")
    }
    seen = {0: np.zeros((0, 3 * HEADS, HEAD_DIM)), 1: np.zeros((0, 3 * HEADS, HEAD_DIM))}

    def forward(lengths: dict[int, int]) -> None:
        qkv = random.floats(sum(lengths.values()), 3 * HEADS, HEAD_DIM)
        kv["begin_forward"](
            cache, tvm_ffi.Shape(list(lengths)), tvm_ffi.Shape(list(lengths.values()))
        )
        found = vm["attend"](tvm.runtime.tensor(qkv[None], device=device), cache)[0].numpy()[0]
        kv["end_forward"](cache)
        start = 0
        for sequence, length in lengths.items():
            seen[sequence] = np.concatenate([seen[sequence], qkv[start : start + length]])
            q, k, v = np.split(seen[sequence], 3, axis=1)
            expected = attention(q[-length:], k, v)
            error = np.abs(found[start : start + length] - expected).max()
            assert error < 1e-4, f"seed {random.seed}, lengths {lengths}: {error}"
            start += length

    for sequence in seen:
        kv["add_sequence"](cache, sequence)
    forward({0: 33})
    forward({1: 17})
    for _ in range(20):
        forward({0: 1, 1: 1})


def test_planned_memory_and_repeated_calls(device) -> None:
    """A chain of operators whose intermediate tensors share storage, of changing sizes."""

    class Chain(nn.Module):
        def chain(self, x: nn.Tensor) -> nn.Tensor:
            for _ in range(3):
                x = nn.op.relu(x * 2.0 - 1.0) + nn.op.permute_dims(nn.op.permute_dims(x))
            return nn.op.softmax(x, axis=-1)

    plain = {"param_mode": "none", "effect_mode": "none"}
    with tvm.target.Target("webgpu", host="llvm"):
        chain = Chain()
        module, _ = chain.export_tvm(
            spec={"chain": {"x": nn.spec.Tensor(["n", 48], "float32"), "$": plain}}
        )
        module = relax.get_pipeline("zero")(module)
        module = dl.ApplyDefaultSchedule(
            dl.gpu.Reduction(), dl.gpu.GeneralReduction(), dl.gpu.Fallback()
        )(module)
    vm = machine(module)
    reserved = []
    for n in [1, 7, 300, 7, 300, 300] * 5:
        random = Random()
        x = random.floats(n, 48)
        found = vm["chain"](tvm.runtime.tensor(x, device=device)).numpy()
        expected = x.astype(np.float64)
        for _ in range(3):
            expected = np.maximum(expected * 2 - 1, 0) + expected
        expected = np.exp(expected - expected.max(axis=1, keepdims=True))
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"seed {random.seed}")
        if n == 300:
            reserved.append(wgpu.statistics()["reserved_bytes"])
    assert len(set(reserved[-10:])) == 1, f"memory grows: {reserved}"

"""--target vulkan: what it resolves to, and GPUs that could not run what is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from awq_checkpoints import make_awq_checkpoint
from made_up_gpu import GPU

from mlcawq.build import vulkan_target as module
from mlcawq.build.pipeline import BuildRequest, check
from mlcawq.build.targets import resolve_target, target_device, target_record
from mlcawq.build.vulkan_target import check_type
from mlcawq.engine import devices
from mlcawq.engine.devices import Device, Missing
from mlcawq.errors import UserError
from tir_kernels.vulkan import limits


def with_device(monkeypatch: pytest.MonkeyPatch, found: Device | Missing) -> None:
    monkeypatch.setattr(devices, "find_device", lambda kind, index=0: found)


@pytest.mark.parametrize("name", ["vulkan", "vulkan:portable", '{"kind": "webgpu"}'])
def test_wgsl_within_the_guaranteed_limits(name: str) -> None:
    target = resolve_target(name)
    assert target.kind.name == "webgpu"
    assert target_device(target) == "vulkan"
    assert target.host.kind.name == "llvm"
    record = target_record(target)
    assert record["max_num_threads"] == 256
    assert not record["supports_subgroups"]
    assert "host" not in record


def test_tvms_own_vulkan_is_used_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_own_vulkan", lambda: True)
    with_device(monkeypatch, Missing("none", "buy one"))
    target = resolve_target("vulkan")
    assert target.kind.name == "vulkan"
    assert target_device(target) == "vulkan"
    assert target.attrs["supports_float16"]
    assert (
        resolve_target('{"kind": "vulkan", "max_num_threads": 128}').attrs["max_num_threads"] == 128
    )


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="built without Vulkan"):
        resolve_target('{"kind": "vulkan"}')
    with pytest.raises(UserError, match="does not accept"):
        resolve_target('{"kind": "webgpu", "no_such_key": 1}')
    with pytest.raises(UserError, match="vulkan:portable"):
        resolve_target("vulkan:1")


def test_a_gpu_without_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    single = dataclasses.replace(GPU, shader_f16=False)
    with_device(monkeypatch, Device("vulkan", 0, SimpleNamespace(type="webgpu"), single))
    with pytest.raises(UserError, match=r"--quantization q4f32_autoawq_g64, or .*portable"):
        check_type("vulkan", "q4f16_autoawq_g64")
    check_type("vulkan", "q4f32_autoawq_g64")
    check_type("vulkan:portable", "q4f16_autoawq")
    check_type("cpu", "q4f16_autoawq")
    with_device(monkeypatch, Missing("none", "buy one"))
    check_type("vulkan", "q4f16_autoawq")


def test_weights_that_no_kernel_could_take_are_named_before_any_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = make_awq_checkpoint(tiny_llama, tmp_path / "awq", 32)
    request = BuildRequest(target="vulkan:portable", weight_layout="autoawq", verify=False)
    # gate_up of both layers has more than this, nothing else has.
    monkeypatch.setattr(limits, "BINDING_BYTES", 128 * 256 // 2)
    with pytest.raises(
        UserError, match=r"(?s)gate_up_proj.qweight \(and 1 more\).*leave --weight"
    ) as e:
        check(checkpoint, tmp_path / "out", request)
    assert len(e.value.problems) == 1
    tiled = dataclasses.replace(request, weight_layout=None)
    assert check(checkpoint, tmp_path / "out", tiled).quantization.weight_layout == "n16k64"

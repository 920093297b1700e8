"""Which device and which library an engine takes, on machines made up for the purpose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from made_up_gpu import GPU

from mlcawq.engine import devices
from mlcawq.engine.artifact import BuiltFolder
from mlcawq.engine.conversation import Conversation
from mlcawq.engine.devices import Device, Missing, choose_device, find_device
from mlcawq.errors import UserError

LAVAPIPE = dataclasses.replace(GPU, device_type="software")


def folder(*kinds: str) -> BuiltFolder:
    conversation = Conversation(name="LM", roles={"user": "", "assistant": ""}, seps=[""])
    libraries = {kind: Path(f"lib-{kind}.so") for kind in kinds}
    return BuiltFolder(Path("model"), {}, conversation, (), libraries)


def tvm_device(**facts: object) -> SimpleNamespace:
    return SimpleNamespace(type="webgpu", **facts)


def machine(monkeypatch: pytest.MonkeyPatch, *present: Device) -> None:
    def find(kind: str, index: int = 0) -> Device | Missing:
        for device in present:
            if (device.kind, device.index) == (kind, index):
                return device
        return Missing(f"no {kind} is here", f"buy {kind}")

    monkeypatch.setattr(devices, "find_device", find)


CPU = Device("cpu", 0, None)
CUDA = Device("cuda", 0, None)
VULKAN = Device("vulkan", 0, tvm_device(), GPU)
SOFTWARE = Device("vulkan", 0, tvm_device(), LAVAPIPE)


@pytest.mark.parametrize(
    ("present", "libraries", "chosen"),
    [
        ((CPU, CUDA, VULKAN), ("cpu", "vulkan", "cuda"), "cuda"),
        ((CPU, VULKAN), ("cpu", "vulkan", "cuda"), "vulkan"),
        ((CPU, SOFTWARE), ("cpu", "vulkan", "cuda"), "cpu"),
        ((CPU, SOFTWARE), ("vulkan", "cuda"), "vulkan"),
        ((CPU,), ("cpu", "vulkan", "cuda"), "cpu"),
    ],
)
def test_the_fastest_device_with_a_library(
    present: tuple[Device, ...],
    libraries: tuple[str, ...],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, *present)
    device, library = choose_device(folder(*libraries), "auto")
    assert (device.kind, library.name) == (chosen, f"lib-{chosen}.so")


def test_a_device_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    second = dataclasses.replace(VULKAN, index=1)
    machine(monkeypatch, CPU, VULKAN, second)
    built = folder("cpu", "vulkan")
    assert choose_device(built, "vulkan:1")[0] is second
    assert choose_device(built, "webgpu")[0] is VULKAN  # TVM's name for it
    assert choose_device(built, "vulkan")[0].name == "vulkan:0"
    with pytest.raises(
        UserError, match=r"vulkan:2 cannot be used.*no vulkan is here\n.*buy vulkan"
    ):
        choose_device(built, "vulkan:2")
    with pytest.raises(UserError, match=r"no library for cuda(?s:.*)--target cuda"):
        choose_device(built, "cuda")
    for odd in ("tpu", "vulkan:x", "auto:1"):
        with pytest.raises(UserError, match="unknown device"):
            choose_device(built, odd)


def test_every_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, CPU)
    with pytest.raises(UserError) as error:
        choose_device(folder("cuda", "vulkan"), "auto")
    assert [problem.fix for problem in error.value.problems[:2]] == ["buy cuda", "buy vulkan"]
    assert "no library that runs here" in str(error.value)


def test_what_is_missing_here_has_a_reason() -> None:
    for kind in ("metal", "rocm"):
        missing = find_device(kind)
        assert isinstance(missing, Missing)
        assert kind in missing.reason
    assert isinstance(find_device("cpu"), Device)


@pytest.mark.parametrize(
    ("device", "target", "quantization", "words"),
    [
        (VULKAN, {"kind": "webgpu", "max_num_threads": 256}, "q4f16_autoawq", ""),
        (VULKAN, {}, "q4f16_autoawq", ""),
        (VULKAN, {"kind": "webgpu", "max_num_threads": 1024}, "q4f16_autoawq", "allows 256"),
        (VULKAN, {"kind": "vulkan"}, "q4f16_autoawq", "this TVM has webgpu instead"),
        (
            dataclasses.replace(VULKAN, limits=dataclasses.replace(GPU, shader_f16=False)),
            {"kind": "webgpu"},
            "q0f16",
            "q0f16 computes in float16",
        ),
        (
            dataclasses.replace(VULKAN, limits=dataclasses.replace(GPU, shader_f16=False)),
            {"kind": "webgpu"},
            "q4f32_autoawq",
            "",
        ),
        (
            Device("cuda", 0, SimpleNamespace(compute_version="8.0")),
            {"kind": "cuda", "arch": "sm_90a"},
            "q4f16_autoawq",
            "compiled for sm_90a, and cuda:0 is sm_80",
        ),
        (
            Device("cuda", 0, SimpleNamespace(compute_version="8.9")),
            {"kind": "cuda", "arch": "sm_86"},
            "q4f16_autoawq",
            "",
        ),
    ],
)
def test_libraries_for_other_devices_are_refused(
    device: Device, target: dict[str, object], quantization: str, words: str
) -> None:
    refusal = device.refusal(target, quantization)
    assert words in refusal
    assert bool(refusal) == bool(words)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**34))
    assert CPU.free_memory(2**30) == 2**34
    assert SOFTWARE.free_memory(2**30) == 2**34
    tells = Device("cuda", 0, SimpleNamespace(available_global_memory=2**33))
    assert tells.free_memory(2**30) == 2**33
    total = Device("cuda", 0, SimpleNamespace(total_global_memory=2**33))
    assert total.free_memory(2**30) == 2**33 - 2**30
    assert VULKAN.free_memory(2**28) == 2**30
    assert VULKAN.free_memory(2**32) == 2**32
    assert VULKAN.free_memory(2**40) == 2**34


def test_the_widest_tensor() -> None:
    assert CPU.binding_bytes is None
    assert VULKAN.binding_bytes == 2**27

"""--target cuda: what it resolves to, with a GPU and without, and what is refused."""

from __future__ import annotations

import pytest

from mlcawq.build import cuda_target as module
from mlcawq.build.cuda_target import cuda_target, cuda_target_from_json
from mlcawq.engine.cuda_arch import CUDA_ARCHS, arch_for, capability_of, runs_on
from mlcawq.engine.cuda_driver import Driver, Gpu
from mlcawq.errors import UserError


def machine_with(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    gpus = tuple(Gpu(i, f"GPU {i}", c, 2**34) for i, c in enumerate(capabilities))
    monkeypatch.setattr(module, "find_driver", lambda: (Driver((13, 0), gpus), ""))


@pytest.mark.parametrize("name", CUDA_ARCHS)
def test_named_architectures(name: str) -> None:
    target = cuda_target(f"cuda:{name}")
    assert target.kind.name == "cuda"
    assert capability_of(str(target.attrs["arch"])) == capability_of(name)
    assert int(target.attrs["thread_warp_size"]) == 32
    assert int(target.attrs["max_threads_per_block"]) == 1024
    assert target.host.kind.name == "llvm"


def test_hopper_has_its_own_instructions() -> None:
    assert cuda_target("cuda:sm_90").attrs["arch"] == "sm_90a"
    assert cuda_target("cuda:sm_90a").attrs["arch"] == "sm_90a"


@pytest.mark.parametrize("name", ["cuda:sm_70", "cuda:90", "cuda:sm_9", "cuda:", "cuda:sm_86a"])
def test_unknown_architectures_get_the_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_driver", lambda: (None, "no NVIDIA driver is installed"))
    with pytest.raises(UserError) as error:
        cuda_target(name)
    assert all(arch in str(error.value) for arch in CUDA_ARCHS)


def test_without_a_gpu_the_architecture_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_driver", lambda: (None, "no NVIDIA driver is installed"))
    with pytest.raises(UserError, match="no NVIDIA driver is installed") as error:
        cuda_target("cuda")
    assert "--target cuda:sm_90" in str(error.value)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), "sm_75"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_87"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
    ],
)
def test_the_gpu_of_this_machine(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, capability, (12, 0))
    assert cuda_target("cuda").attrs["arch"] == arch


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, (6, 1))
    with pytest.raises(UserError, match="sm_61"):
        cuda_target("cuda")


def test_json() -> None:
    given = {"kind": "cuda", "arch": "sm_90", "max_shared_memory_per_block": 65536}
    target = cuda_target_from_json(given, "text")
    assert target.attrs["arch"] == "sm_90a"
    assert int(target.attrs["max_shared_memory_per_block"]) == 65536
    assert int(target.attrs["thread_warp_size"]) == 32
    with pytest.raises(UserError, match="does not accept"):
        cuda_target_from_json({"kind": "cuda", "arch": "sm_80", "no_such": 1}, "text")
    with pytest.raises(UserError, match="sm_10x"):
        cuda_target_from_json({"kind": "cuda", "arch": "sm_10x"}, "sm_10x")
    with pytest.raises(UserError, match="no text"):
        cuda_target_from_json({"kind": "cuda", "arch": 80}, "text")


def test_whose_code_runs_where() -> None:
    assert runs_on("sm_80", (8, 6))
    assert runs_on("sm_86", (8, 9))
    assert not runs_on("sm_86", (8, 0))
    assert not runs_on("sm_80", (9, 0))
    assert runs_on("sm_90a", (9, 0))
    assert not runs_on("sm_90a", (9, 1))
    # A system on a chip and the cards of its generation do not share machine code.
    assert not runs_on("sm_86", (8, 7))
    assert not runs_on("sm_87", (8, 9))
    nearest = arch_for((10, 3))
    assert nearest is not None
    assert nearest.name == "sm_100"
    assert arch_for((6, 1)) is None

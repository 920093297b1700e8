"""The WebGPU device: its limits, memory and copies, on whatever Vulkan driver the machine has."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from wgpu_for_tests import Random, needs_vulkan, output, run_python

from mlcawq.engine import wgpu
from mlcawq.errors import UserError

pytestmark = needs_vulkan

SIZES = (0, 1, 2, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097)


@pytest.fixture(scope="module")
def device() -> tvm.runtime.Device:
    wgpu.load()
    return tvm.device("webgpu", 0)


def upload(array: np.ndarray, device: tvm.runtime.Device) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(array, device=device)


def view(tensor: tvm.runtime.Tensor, offset: int, nbytes: int) -> tvm.runtime.Tensor:
    create = tvm.get_global_func("runtime.TVMTensorCreateView")
    return create(tensor, tvm_ffi.Shape([nbytes]), "uint8", offset)


def test_the_device_tells_what_it_is(device) -> None:
    limits = wgpu.limits(0)
    assert device.exist
    assert device.device_name == limits.name
    assert device.max_threads_per_block == limits.max_compute_invocations_per_workgroup >= 128
    assert device.max_shared_memory_per_block == limits.max_compute_workgroup_storage_size
    assert next(iter(device.max_thread_dimensions)) == limits.max_compute_workgroup_size_x
    assert limits.max_storage_buffer_binding_size >= 2**27
    assert limits.max_storage_buffers_per_shader_stage >= 8
    assert limits.backend == "vulkan"
    assert not tvm.device("webgpu", len(wgpu.adapters())).exist
    with pytest.raises(UserError, match="there is no Vulkan device 63"):
        wgpu.limits(63)


def test_memory_of_the_device_is_known(device) -> None:
    assert device.total_global_memory > 2**26


@pytest.mark.parametrize("nbytes", [*SIZES, 20_000_001])
def test_bytes_come_back_as_they_were_sent(device, nbytes: int) -> None:
    random = Random()
    sent = random.bytes(nbytes)
    assert np.array_equal(upload(sent, device).numpy(), sent), f"seed {random.seed}"


def test_copies_of_any_size_at_any_offset_touch_nothing_else(device) -> None:
    random = Random()
    whole = 9001
    for _ in range(60):
        size = int(random.generator.choice(SIZES))
        at_source, at_target = (int(i) for i in random.generator.integers(0, whole - size + 1, 2))
        way = random.generator.choice(["upload", "download", "copy"])
        source, target = random.bytes(whole), random.bytes(whole)
        expected = target.copy()
        expected[at_target : at_target + size] = source[at_source : at_source + size]
        host = tvm.cpu(0)
        devices = {"upload": (host, device), "download": (device, host), "copy": (device, device)}
        from_device, to_device = devices[way]
        moved = upload(target, to_device)
        view(upload(source, from_device), at_source, size).copyto(view(moved, at_target, size))
        told = f"seed {random.seed}: {way} of {size} bytes from {at_source} to {at_target}"
        assert np.array_equal(moved.numpy(), expected), told


@pytest.mark.parametrize("shift", [-4096, -257, -4, -1, 0, 1, 3, 4, 256, 5000])
def test_copies_within_one_tensor(device, shift: int) -> None:
    random = Random()
    data = random.bytes(30_000)
    start, size = 10_000, 9_999
    moved = upload(data, device)
    view(moved, start, size).copyto(view(moved, start + shift, size))
    expected = data.copy()
    expected[start + shift : start + shift + size] = data[start : start + size]
    assert np.array_equal(moved.numpy(), expected), f"seed {random.seed}"


def test_copies_larger_than_the_staging_memory(device) -> None:
    random = Random()
    sent = random.bytes(100_000_003)
    moved = upload(sent, device)
    assert np.array_equal(moved.numpy(), sent), f"seed {random.seed}"
    odd = tvm.runtime.empty((60_000_001,), "uint8", device=device)
    view(moved, 40_000_002, 60_000_001).copyto(odd)
    assert np.array_equal(odd.numpy(), sent[40_000_002:]), f"seed {random.seed}"


def test_order_is_kept_when_memory_changes_hands(device) -> None:
    """A freed tensor's memory goes to the next one while its last copy may still be recorded."""
    random = Random()
    kept = []
    for _ in range(300):
        sent = random.bytes(1000)
        passing = upload(sent, device)
        copy = tvm.runtime.empty((1000,), "uint8", device=device)
        passing.copyto(copy)
        kept.append((sent, copy))
    assert all(np.array_equal(copy.numpy(), sent) for sent, copy in kept), f"seed {random.seed}"


def test_memory_is_returned(device) -> None:
    random = Random()
    before = wgpu.statistics()
    for i in range(3000):
        size = int(random.generator.integers(0, 200_000)) if i % 100 else 30_000_000
        tensor = tvm.runtime.empty((size,), "uint8", device=device)
        if i % 10 == 0:
            tensor.copyfrom(np.zeros(size, np.uint8))
    del tensor
    device.sync()
    after = wgpu.statistics()
    assert after["allocated_bytes"] == before["allocated_bytes"]
    assert after["allocations"] == before["allocations"]
    assert after["reserved_bytes"] - before["reserved_bytes"] <= 64 * 2**20
    resident = resident_bytes()
    for _ in range(40):
        tvm.runtime.tensor(np.zeros(50_000_000, np.uint8), device=device)
    device.sync()
    assert resident_bytes() - resident < 300_000_000


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_tensor_larger_than_any_buffer_is_refused(device) -> None:
    with pytest.raises(MemoryError, match="buffers of at most"):
        tvm.runtime.empty((wgpu.limits().max_buffer_size + 1,), "uint8", device=device)


EXHAUST = """
import resource
import numpy as np
from mlcawq.engine import wgpu
wgpu.load()
import tvm
device = tvm.device("webgpu", 0)
kept = tvm.runtime.tensor(np.arange(1000), device=device)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
tensors = []
try:
    while len(tensors) < 20:
        tensors.append(tvm.runtime.empty((300 * 2**20,), "uint8", device=device))
except MemoryError as error:
    print(len(tensors), error)
tensors.clear()
tvm.runtime.empty((300 * 2**20,), "uint8", device=device)
assert np.array_equal(kept.numpy(), np.arange(1000))
print("goes on")
"""


def test_exhausted_memory_is_an_exception_and_no_end() -> None:
    if wgpu.limits().device_type != "software":
        pytest.skip("the GPU has memory of its own, which a test cannot ration")
    told = output(run_python(EXHAUST))
    assert "ran out of memory while allocating 314572800 bytes" in told
    assert told.endswith("goes on\n")


def test_threads_share_the_device(device) -> None:
    wrong: list[str] = []

    def work() -> None:
        random = Random()
        for _ in range(50):
            sent = random.bytes(int(random.generator.integers(1, 50_000)))
            if not np.array_equal(upload(sent, device).numpy(), sent):
                wrong.append(f"seed {random.seed}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


TWO = """
from mlcawq.engine import wgpu
wgpu.load()
import numpy as np, tvm
assert len(wgpu.adapters()) == 2
first, second = (tvm.device("webgpu", i) for i in range(2))
data = np.arange(12_345, dtype="float32")
there = tvm.runtime.tensor(data, device=second)
here = tvm.runtime.empty(data.shape, "float32", device=first)
there.copyto(here)
assert np.array_equal(here.numpy(), data) and np.array_equal(there.numpy(), data)
print(*(wgpu.statistics(i)["allocations"] for i in range(2)))
"""


def test_two_devices(tmp_path) -> None:
    drivers = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not drivers:
        pytest.skip("Mesa's software driver is not installed; it can stand in for two GPUs")
    copy = tmp_path / "again.json"
    copy.write_text(drivers[0].read_text())
    both = f"{drivers[0]}:{copy}"
    found = run_python(TWO, VK_ICD_FILENAMES=both, VK_DRIVER_FILES=both)
    assert output(found) == "1 1\n"


def test_settings_choose_the_adapter() -> None:
    show = "from mlcawq.engine import wgpu; print(wgpu.limits().name)"
    name = wgpu.adapters()[-1].name
    assert output(run_python(show, MLCAWQ_VULKAN_DEVICE=name[:8])).strip() == name
    refused = run_python(show, MLCAWQ_VULKAN_DEVICE="no such GPU")
    _, complaint = refused.communicate()
    assert "MLCAWQ_VULKAN_DEVICE is 'no such GPU', and this machine has 0: " in complaint

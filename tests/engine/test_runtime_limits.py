"""What a device cannot hold: caches are cut to it, and the rest is an error that says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tvm
from made_up_gpu import GPU

from mlcawq.engine import runtime as module
from mlcawq.engine.artifact import read_folder
from mlcawq.engine.devices import Device
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.errors import UserError

PAGE_BYTES = 16 * 2 * 2 * 32 * 4  # tokens, key and value, heads, their width, float32


def on_device_with(
    monkeypatch: pytest.MonkeyPatch, library: Path, *, binding_bytes: int, memory: int = 2**40
) -> None:
    """The CPU, with the limits of a GPU. memory: beside the weights."""
    limits = dataclasses.replace(GPU, max_storage_buffer_binding_size=binding_bytes)
    device = Device("cpu", 0, tvm.cpu(0), limits)
    monkeypatch.setattr(Device, "free_memory", lambda self, weights: memory + weights)
    monkeypatch.setattr(module, "choose_device", lambda built, asked: (device, library))


def test_the_pages_of_a_layer_fit_into_a_binding(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(built)
    on_device_with(monkeypatch, folder.libraries["cpu"], binding_bytes=9 * PAGE_BYTES)
    assert ModelRuntime(folder).total_pages * PAGE_BYTES <= 9 * PAGE_BYTES
    # Asked for or not: a larger cache could not be used.
    runtime = ModelRuntime(folder, max_total_tokens=1024)
    assert runtime.capacity <= 9 * 16
    runtime.add_sequence(0)
    for _ in range(4):
        runtime.prefill([(0, list(range(32)))])
    on_device_with(monkeypatch, folder.libraries["cpu"], binding_bytes=PAGE_BYTES)
    with pytest.raises(UserError, match="room for 0 tokens only"):
        ModelRuntime(folder)


def test_little_memory(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = read_folder(built)
    library = folder.libraries["cpu"]
    on_device_with(monkeypatch, library, binding_bytes=2**30, memory=2 * 10 * PAGE_BYTES)
    assert 32 <= ModelRuntime(folder).capacity <= 7 * 16
    on_device_with(monkeypatch, library, binding_bytes=2**30, memory=2 * PAGE_BYTES)
    with pytest.raises(UserError, match="--prefill-chunk-size"):
        ModelRuntime(folder)


def test_chunks_that_a_binding_holds(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = read_folder(built)
    widths = {"gate and up": 2 * 256, "logits": folder.vocab_size}
    whole = ModelRuntime(folder, "cpu", max_total_tokens=256)
    assert whole.prefill_chunk_size == whole.score_chunk == 32
    library = folder.libraries["cpu"]
    on_device_with(monkeypatch, library, binding_bytes=30 * 4 * widths["gate and up"])
    cut = ModelRuntime(folder, max_total_tokens=16)
    assert cut.prefill_chunk_size == 30
    assert cut.score_chunk == 30
    on_device_with(monkeypatch, library, binding_bytes=20 * 4 * widths["logits"])
    cut = ModelRuntime(folder, max_total_tokens=16)
    assert cut.score_chunk == 20 * widths["logits"] // max(widths.values())


@pytest.mark.parametrize(
    "error", [MemoryError("the GPU has no more"), RuntimeError("CUDA error: out of memory")]
)
def test_a_device_that_runs_out(
    built: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_weights", fails)
        with pytest.raises(UserError, match="cpu:0 runs out of memory while the weights"):
            ModelRuntime(read_folder(built), "cpu")
    monkeypatch.setattr(ModelRuntime, "_create_cache", fails)
    with pytest.raises(UserError, match="while the KV cache is allocated"):
        ModelRuntime(read_folder(built), "cpu")


def test_other_errors_stay_what_they_are(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(module, "load_weights", fails)
    with pytest.raises(RuntimeError, match="something else"):
        ModelRuntime(read_folder(built), "cpu")

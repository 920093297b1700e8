"""Folders of each format in the tools that they are made for, against the dequantized weights."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_folders import make_quantized_folder
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.quantize import activations
from mlcawq.quantize.integer import IntegerGrid

LOADERS = Path(__file__).parent / "loaders"
PEERS = Path(__file__).parents[3] / ".peers"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="wants compressed-tensors"
)
GRIDS = {
    "asymmetric": IntegerGrid(4, 128),
    "symmetric": IntegerGrid(4, 128, symmetric=True),
    "3 bits": IntegerGrid(3, 32),
    "2 bits": IntegerGrid(2, 64),
    "8 bits": IntegerGrid(8, 64, symmetric=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "llama"
    return make_tiny_model(folder, hidden=256, heads=4, kv_heads=2, tie=True)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 380, (2, 24)))
    return file


def _expected(source: Path, state: dict[str, torch.Tensor], ids: Path) -> np.ndarray:
    """Logits of the dequantized weights, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.load(ids))).logits.numpy()


def _run(python: Path, loader: str, *arguments: object) -> None:
    if not python.is_file():
        pytest.skip(f"no {python}")
    command = [str(part) for part in (python, "-W", "ignore", LOADERS / loader, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def _difference(found: Path, expected: np.ndarray) -> float:
    """Root mean square difference of the logits, of their standard deviation."""
    difference = np.load(found).astype(np.float64) - expected
    return float((difference**2).mean() ** 0.5 / expected.std())


@pytest.mark.peers
@pytest.mark.parametrize("size", [32, 128])
def test_autoawq_gives_the_logits_of_the_gemm_version(
    source: Path, ids: Path, size: int, tmp_path: Path
) -> None:
    folder, state = make_quantized_folder(source, tmp_path / "m", "awq", IntegerGrid(4, size))
    _run(PEERS / "autoawq/bin/python", "autoawq.py", folder, ids, tmp_path / "out.npy")
    # It computes in float16.
    assert _difference(tmp_path / "out.npy", _expected(source, state, ids)) < 5e-3


@pytest.mark.peers
@pytest.mark.parametrize("name", ["awq-gemv", "awq-gemv-fast"])
def test_autoawq_loads_every_tensor_of_the_gemv_versions(
    source: Path, ids: Path, name: str, tmp_path: Path
) -> None:
    folder, _ = make_quantized_folder(source, tmp_path / "m", name)
    out = tmp_path / "out.npz"
    _run(PEERS / "autoawq/bin/python", "autoawq.py", folder, ids, out)
    _same_state(out, folder)


@pytest.mark.peers
def test_llm_awq_loads_every_tensor(source: Path, tmp_path: Path) -> None:
    """MLCAWQ_LLM_AWQ names a checkout of mit-han-lab/llm-awq."""
    checkout = os.environ.get("MLCAWQ_LLM_AWQ")
    if not checkout:
        pytest.skip("MLCAWQ_LLM_AWQ does not name a checkout of llm-awq")
    folder, _ = make_quantized_folder(source, tmp_path / "m", "llm-awq")
    out = tmp_path / "out.npz"
    _run(PEERS / "autoawq/bin/python", "llm_awq.py", folder, checkout, out)
    _same_state(out, folder)


def _same_state(found: Path, folder: Path) -> None:
    """A tool's state dict holds what the folder does, tensor for tensor."""
    state, stored = np.load(found), load_file(folder / "model.safetensors")
    assert set(stored) <= set(state)
    assert set(state) - set(stored) <= {"lm_head.weight"}  # tied
    for name, tensor in stored.items():
        assert np.array_equal(state[name], tensor.numpy()), name


@pytest.mark.peers
def test_transformers_with_gptqmodel_gives_the_logits(
    source: Path, ids: Path, tmp_path: Path
) -> None:
    folder, state = make_quantized_folder(source, tmp_path / "m", "awq")
    python = PEERS / "gptqmodel/bin/python"
    _run(python, "transformers_.py", folder, ids, tmp_path / "out.npy", "float32")
    # Its kernel for CPUs computes in bfloat16.
    assert _difference(tmp_path / "out.npy", _expected(source, state, ids)) < 3e-2


@pytest.mark.peers
@pytest.mark.parametrize("kind", GRIDS)
def test_llm_compressors_environment_gives_the_logits(
    source: Path, ids: Path, kind: str, tmp_path: Path
) -> None:
    name = "compressed-tensors"
    folder, state = make_quantized_folder(source, tmp_path / "m", name, GRIDS[kind])
    python = PEERS / "llmcompressor/bin/python"
    _run(python, "transformers_.py", folder, ids, tmp_path / "out.npy", "float32")
    assert _difference(tmp_path / "out.npy", _expected(source, state, ids)) < 1e-5


@pytest.mark.peers
def test_llm_compressors_environment_quantizes_activations(
    source: Path, ids: Path, tmp_path: Path
) -> None:
    grid = IntegerGrid(8, 128, symmetric=True)
    folder, state = make_quantized_folder(
        source, tmp_path / "m", "compressed-tensors", grid, per_channel=True, activation_bits=8
    )
    python = PEERS / "llmcompressor/bin/python"
    _run(python, "transformers_.py", folder, ids, tmp_path / "out.npy", "float32")
    difference = _difference(tmp_path / "out.npy", _expected(source, state, ids))
    assert 1e-4 < difference < 5e-2  # that of activations of 8 bits


@needs_library
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", ["asymmetric", "3 bits"])
def test_transformers_gives_the_logits_of_compressed_tensors(
    source: Path, ids: Path, kind: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    name = "compressed-tensors"
    folder, state = make_quantized_folder(source, tmp_path / "m", name, GRIDS[kind])
    # transformers 5.23 with compressed-tensors 0.20 loads no packed zero points otherwise.
    how = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=how
    )
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(np.load(ids))).logits.numpy()
    # It dequantizes in the type of the scales.
    expected = _expected(source, {name: t.half().float() for name, t in state.items()}, ids)
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


@needs_library
def test_quantized_activations_are_those_of_transformers(
    source: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    grid = IntegerGrid(8, 128, symmetric=True)
    folder, state = make_quantized_folder(
        source, tmp_path / "m", "compressed-tensors", grid, per_channel=True, activation_bits=8
    )
    tokens = torch.from_numpy(np.load(ids))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens).logits
    plain = torch.from_numpy(_expected(source, state, ids))
    assert (plain - expected).std() > 1e-4 * expected.std()

    def rounded(inputs: torch.Tensor, _: int) -> torch.Tensor:
        """As the library does it on CPUs: its largest integer is 127.5, where kernels have 127."""
        scale = inputs.abs().amax(-1, keepdim=True) / 127.5
        return (inputs / scale).round().clamp(-128, 127) * scale

    monkeypatch.setattr(activations, "round_tokens", rounded)
    (found,) = StreamedModel(folder).logits([tokens])
    # A value here and there rounds to the other side.
    assert (found - expected).std() < 0.1 * (plain - expected).std()

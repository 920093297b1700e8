"""scripts/bench_cpu.py: what is measured, in which order, and what is made of it."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_cpu
from benchmarks.cpu import gguf_files, source, tables, worker
from benchmarks.cpu.bandwidth import Reader
from benchmarks.cpu.contenders import LLAMACPP, OURS, PYTORCH, Contender
from benchmarks.cpu.files import Files
from benchmarks.cpu.measures import CHAT, PREFILL, START, Bench, Outcome, Part, Plan, decode_at
from benchmarks.cpu.processes import WorkerError
from benchmarks.cpu.shapes import LLAMA_1B, QWEN_05B, SHAPES

from mlcawq.checkpoint.config import read_config
from tir_kernels.reference import dequantize

PLAN = Plan(prompt=12, contexts=(8, 40), tokens=4, repeats=3, startups=2)


def contender(name: str, project: str, weights: Path = Path("/dev/null")) -> Contender:
    return Contender(name, project, name, Path(sys.executable), "engine", {}, weights)


# ------------------------------------------------------------------------------------- the worker


class Recorder:
    """A model that knows which tokens it was given."""

    def __init__(self) -> None:
        self.cache: list[int] = []
        self.decoded: list[int] = []  # length of the cache before each step

    def forget(self, kept: int, dropped: int) -> None:
        assert kept + dropped == len(self.cache)
        del self.cache[kept:]

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.cache += [int(token) for token in ids]
        return np.array([len(self.cache), 0], np.float32)

    def decode(self, token: int) -> np.ndarray:
        self.decoded.append(len(self.cache))
        return self.prefill(np.array([token]))

    def facts(self) -> dict[str, Any]:
        return {}


def test_decoding_follows_the_context_that_is_asked_for() -> None:
    model = Recorder()
    session = worker.Session(model, 1000)
    assert session.prefill(600) > 0
    prompt = list(model.cache)
    for context in (40, 1300, 8):
        model.decoded.clear()
        assert session.decode(context, 5) > 0
        assert model.decoded == [context, context + 1, *range(context, context + 5)]
        assert len(model.cache) == context
    assert session.prefill(600) > 0
    assert model.cache == prompt
    assert session.first(3) <= time.monotonic()


def test_logits_are_copied_one_by_one(tmp_path: Path) -> None:
    class Reusing(Recorder):
        buffer = np.zeros(2, np.float32)

        def prefill(self, ids: np.ndarray) -> np.ndarray:
            self.buffer[:] = super().prefill(ids)
            return self.buffer

    worker.Session(Reusing(), 10).logits(6, str(tmp_path / "logits.npy"))
    assert np.load(tmp_path / "logits.npy")[:, 0].tolist() == [6, 7, 8, 9]


def test_a_worker_answers_errors_too() -> None:
    class Failing:
        def facts(self) -> None:
            raise ValueError("first line\nwhat went wrong")

        def double(self, n: int) -> int:
            return 2 * n

    lines = io.StringIO('{"do": "facts"}\n{"do": "double", "n": 4}\n')
    answers = io.StringIO()
    worker.serve(Failing, lines, answers)
    error, result = (json.loads(line) for line in answers.getvalue().splitlines())
    assert error == {"error": "ValueError: what went wrong"}
    assert result == {"result": 8}


def test_no_more_processors_than_threads() -> None:
    allowed = os.sched_getaffinity(0)
    assert len(worker.processors(1)) == 1
    assert worker.processors(1) <= allowed
    assert worker.processors(len(allowed)) == allowed


def test_memory_is_this_process() -> None:
    before = worker.memory()
    held = np.ones(2**23, np.float64)
    after = worker.memory()
    assert after["anonymous"] - before["anonymous"] >= 0.9 * held.nbytes
    assert after["peak"] >= after["anonymous"]


# -------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("base", [LLAMA_1B, QWEN_05B])
def test_the_awq_checkpoint_is_the_source_rounded(base: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = {**base, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    shape = source.Shape("small", "small", config)
    folders = tmp_path / "source", tmp_path / "awq"
    for folder in folders:
        folder.mkdir()
    source.write_source(shape, folders[0])
    source.write_awq(*folders)
    assert read_config(folders[1]).vocab_size == 300
    right = load_file(folders[0] / "model.safetensors")
    found = load_file(folders[1] / "model.safetensors")
    assert ("model.layers.0.self_attn.q_proj.bias" in found) == (base is QWEN_05B)
    for linear in shape.linears():
        name = f"model.layers.0.{linear}"
        parts = [found[f"{name}.{key}"].numpy() for key in ("qweight", "qzeros", "scales")]
        weight = dequantize(*parts, np.float64).T
        scales = parts[2].astype(np.float64).repeat(source.GROUP_SIZE, 0).T
        assert np.all(np.abs(weight - right[f"{name}.weight"].double().numpy()) <= 0.52 * scales)


def test_gguf_reads_bfloat16(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7).bfloat16()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(gguf_files.read_tensors(tmp_path / "model.safetensors"))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert np.array_equal(found[name], tensor.float().numpy())


def test_gguf_scales_rope_as_transformers_does() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**LLAMA_1B), "cpu")
    half = LLAMA_1B["head_dim"] // 2
    plain = LLAMA_1B["rope_theta"] ** -(np.arange(half) / half)
    found = plain / gguf_files.rope_factors(LLAMA_1B)
    assert np.allclose(found, inverse.numpy(), rtol=1e-5)


def test_gguf_names() -> None:
    assert gguf_files.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_files.gguf_name("model.norm.weight") == "output_norm.weight"
    assert gguf_files.gguf_name("model.layers.11.self_attn.k_proj.bias") == "blk.11.attn_k.bias"
    assert gguf_files.gguf_name("model.layers.0.input_layernorm.weight") == "blk.0.attn_norm.weight"


# -------------------------------------------------------------------------------------- bandwidth


def test_all_of_the_buffer_is_read() -> None:
    reader = Reader(threads=1, megabytes=4)
    speeds = reader.read()
    assert set(speeds) == {"plain pages", "huge pages"}
    assert all(speed > 0 for speed in speeds.values())
    assert reader.total() == 4 * 2**20 // 4  # every int32 is one


# ------------------------------------------------------------------------------------- the rounds


class FakeWorker:
    """Answers at once; the time of a run tells whose and which it was."""

    started = 0.0
    cpu_seconds = 0.0

    def __init__(self, name: str, asked: list[tuple[str, str]], sign: float) -> None:
        self.name, self.asked, self.sign, self.runs = name, asked, sign, 0

    def ask(self, do: str, **arguments: Any) -> Any:
        self.asked.append((self.name, do))
        if self.name == "broken" and do == "prefill":
            raise WorkerError("no memory")
        if do == "logits":
            rows = self.sign * np.random.default_rng(0).normal(size=(4, 50))
            np.save(arguments["file"], rows)
        if do == "decode" and arguments["tokens"] == 1:
            return 9.0 if self.name == "slow" else 0.1
        self.runs += 1
        answers: dict[str, Any] = {
            "facts": {},
            "memory": {"peak": 10**8},
            "read": {"huge pages": 2e9, "plain pages": 1e9},
        }
        return answers.get(do, 1000.0 if self.runs < 4 else float(self.runs))

    def close(self) -> None:
        self.asked.append((self.name, "close"))

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a bench of contenders by these names; returns the part and what was asked of whom."""
    monkeypatch.setattr("benchmarks.cpu.measures._SETTLE", 0)
    monkeypatch.setattr("benchmarks.cpu.measures.chat_seconds", lambda *_: 0.5)

    def run(*names: str, reference: str = "", plan: Plan = PLAN) -> Any:
        asked: list[tuple[str, str]] = []
        bench = Bench(plan, Files(tmp_path, lambda _: None), lambda _: None)
        monkeypatch.setattr(
            Bench,
            "start",
            lambda _, one, threads: FakeWorker(one.name, asked, -1.0 if one.name == "other" else 1),
        )
        entered = [contender(name, OURS) for name in names]
        part = Part("model", 2, [Outcome(one) for one in entered], {}, 100)
        right = next((one for one in entered if one.name == reference), None)
        bench.measure(part, contender("reader", ""), right, check=bool(reference))
        bench.start_up(part)
        return part, asked

    return run


def test_variants_that_win_nothing_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever comes first, one that is fastest stays, under its name."""
    seconds = {"slow": 3.0, "fast": 1.0, "as fast": 1.0}

    class Worker(FakeWorker):
        def ask(self, do: str, **arguments: Any) -> Any:
            return seconds[self.name]

    bench = Bench(PLAN, Files(tmp_path, lambda _: None), lambda _: None)
    monkeypatch.setattr(Bench, "start", lambda _, one, threads: Worker(one.name, [], 1))
    for order in itertools.permutations(seconds):
        assert bench.fastest([contender(name, LLAMACPP) for name in order], 1) == ["as fast"]


def test_runs_alternate_and_the_first_does_not_count(measured: Callable[..., Any]) -> None:
    part, asked = measured("a", "b")
    order = [name for name, do in asked if do == "prefill"]
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    for outcome in part.outcomes:
        assert set(outcome.runs) == {PREFILL, decode_at(8), decode_at(40), START, CHAT}
        assert [len(runs) for runs in outcome.runs.values()] == [3, 3, 3, 2, 2]
    assert {name for name, do in asked if do == "close"} == {"a", "b", "reader"}
    assert part.bandwidth["huge pages"] == [2e9] * 9
    assert part.best_bandwidth == 2e9


def test_who_cannot_go_on_stops_nobody_else(measured: Callable[..., Any]) -> None:
    part, asked = measured("broken", "slow", "a")
    broken, slow, good = part.outcomes
    assert broken.refused == "no memory"
    assert "0.11 tokens/s" in slow.refused
    assert not good.refused
    assert len(good.runs[PREFILL]) == 3
    assert ("slow", "prefill") not in asked
    assert asked.count(("broken", "prefill")) == 1


def test_who_computes_something_else_is_not_timed(measured: Callable[..., Any]) -> None:
    part, asked = measured("a", "other", "b", reference="b")
    assert [outcome.refused[:23] for outcome in part.outcomes] == [
        "",
        "computes something else",
        "",
    ]
    assert part.outcomes[0].correlation == pytest.approx(1)
    assert ("other", "prefill") not in asked


# ------------------------------------------------------------------------------ tables and targets


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """Ours, with 10 GB/s of bandwidth and 100 MB a token, beside one of each."""
    weights = tmp_path / "weights"
    with weights.open("wb") as file:
        file.truncate(10**8)

    def outcome(name: str, project: str, prefill: float, step: float, peak: int) -> Outcome:
        runs = {PREFILL: [prefill, prefill, 99.0], decode_at(8): [step], decode_at(40): [2 * step]}
        found = Outcome(contender(name, project, weights), runs, {"peak": peak})
        if project == OURS:
            found.runs[START] = [0.7, 0.8, 1.2]
        return found

    outcomes = [
        outcome("ours, x", OURS, 1.0, 0.0125, 10**9),
        outcome("llama, slow", LLAMACPP, 5.0, 0.02, 2 * 10**9),
        outcome("llama, fast", LLAMACPP, 2.0, 0.015, 3 * 10**9),
        outcome("torch", PYTORCH, 1.4, 0.5, 10**9),
    ]
    return Part("model", 1, outcomes, {"huge pages": [9e9, 10e9, 11e9], "plain": [5e9]}, 0)


def test_targets_are_against_the_best(part: Part) -> None:
    found = {(t.name, t.where.rpartition("context ")[2]): t for t in tables.targets(part, PLAN)}
    values = [round(t.value, 3) if t.value else None for t in found.values()]
    assert values == [1.2, 0.8, 1.2, 0.4, 1.4, 0.5, 0.8]
    reached = [t.reached for t in found.values()]
    assert reached == [True, False, True, False, False, True, True]
    lines = [t.line() for t in found.values()]
    assert lines[0].startswith("reached")
    assert lines[1].startswith("MISSED")
    del part.outcomes[1:]
    absent = tables.targets(part, PLAN)[0]
    assert absent.reached is None
    assert absent.line().startswith("not measured")


def test_a_cache_is_counted_as_it_is_kept(part: Part) -> None:
    part.cached = 10**5
    contender = part.outcomes[0].contender
    before = part.share(part.outcomes[0], 40, 0)
    part.outcomes[0].contender = replace(contender, cached_bytes=1.0)
    after = part.share(part.outcomes[0], 40, 0)
    assert before is not None
    assert after is not None
    nbytes = contender.weight_bytes
    assert before / after == pytest.approx((nbytes + 80e5) / (nbytes + 40e5))


def test_tables_show_medians_and_reasons(part: Part) -> None:
    part.outcomes[3].refused = "it has no memory"
    text = tables.as_text(part, PLAN)
    assert "huge pages 10.0 GB/s" in text[0]
    ours = next(line for line in text if line.startswith("ours, x"))
    assert ours.split()[2:] == ["12.0", "80.0", "40.0", "80%", "40%", "1000", "0.80"]
    assert next(line for line in text if line.startswith("torch")).endswith("it has no memory")
    markdown = [line for line in tables.as_markdown(part, PLAN) if line.startswith("|")]
    assert len(markdown) == 6
    assert len({line.count("|") for line in markdown}) == 1
    content = json.loads(json.dumps(tables.as_json([part], PLAN)))
    assert content["parts"][0]["contenders"][0]["seconds"][START] == [0.7, 0.8, 1.2]


# -------------------------------------------------------------------------------------- the cache


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    files = Files(tmp_path, lambda _: None)
    found = [files.note("n", [key], lambda key=key: key * 2) for key in ("a", "a", "b")]
    assert found == ["aa", "aa", "bb"]
    assert [path.name[:2] for path in tmp_path.iterdir()] == ["n-"]
    with pytest.raises(ZeroDivisionError):
        files.note("m", ["a"], lambda: 1 // 0)
    assert files.note("m", ["a"], lambda: 3) == 3
    assert files.note("m", ["a"], lambda: 4, again=True) == 4


def test_bytes_of_a_token_leave_out_what_is_not_read(tmp_path: Path) -> None:
    records = [
        {"name": "model.embed_tokens.weight", "nbytes": 1000},
        {"name": "model.norm.weight", "nbytes": 10},
    ]
    cache = tmp_path / "tensor-cache.json"
    cache.write_text(json.dumps({"records": [{"records": records}]}))
    assert contender("tied", OURS, tmp_path).weight_bytes == 1010
    records.append({"name": "lm_head.qweight", "nbytes": 300})
    cache.write_text(json.dumps({"records": [{"records": records}]}))
    assert contender("untied", OURS, tmp_path).weight_bytes == 310


# ------------------------------------------------------------------------------------------ whole


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "result.json"
    common = "--models tiny --threads 1 --contexts 8 40 --prompt 16 --tokens 3 --repeats 2"
    rest = [
        "--startups",
        "1",
        "--no-torch-compile",
        "--json",
        str(file),
        "--cache",
        str(tmp_path / "cache"),
    ]
    bench_cpu.main([*common.split(), *rest, *options])
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.mark.slow
def test_ours_and_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--contenders ours PyTorch --heads float16 int8 int4 --target cpu:native"
    content = run(tmp_path, *options.split())
    (part,) = content["parts"]
    assert {one["project"] for one in part["contenders"]} == {OURS, PYTORCH}
    for one in part["contenders"]:
        assert not one["refused"]
        assert one["correlation"] > 0.85
        assert {PREFILL, "decode at 8", "decode at 40", START} <= set(one["seconds"])
        assert (CHAT in one["seconds"]) == (one["project"] == OURS)
        assert one["memory"]["peak"] > 2**24
    assert "not measured" in capsys.readouterr().out  # llama.cpp was left out


@pytest.mark.peers
def test_llamacpp(tmp_path: Path) -> None:
    if not bench_cpu._LLAMACPP.is_file():
        pytest.skip("run scripts/peers/setup_llamacpp.sh")
    content = run(tmp_path, "--contenders", "llama.cpp", "PyTorch")
    (part,) = content["parts"]
    found = {one["name"].split(" (")[0]: one for one in part["contenders"]}
    assert {"llama.cpp Q4_0", "llama.cpp Q4_K_M"} < set(found)
    for one in found.values():
        assert not one["refused"]
        assert one["correlation"] > 0.85


def test_the_shapes_are_those_of_the_released_models() -> None:
    from math import prod

    counts = {}
    for name, shape in SHAPES.items():
        linears = sum(prod(size) for size in shape.linears().values()) * shape.layers
        counts[name] = linears + shape.vocabulary * int(shape.config["hidden_size"])
    assert counts["llama-1b"] == pytest.approx(1.236e9, rel=1e-3)
    assert counts["qwen-0.5b"] == pytest.approx(0.494e9, rel=1e-3)
    assert SHAPES["llama-1b"].cached == 16384

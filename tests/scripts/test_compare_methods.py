"""scripts/compare_methods.py: jobs, tables, absent peers; with peers, each one's real work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model

from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compare_methods
from compare_awq import Setting
from compare_methods import Contender, Subject, compare, find_contenders, parse
from peers.runners import PEERS, Ours, Peer, Runner
from peers.store import Cell, Result, Score, Store
from peers.tables import HEADER, duels, line, markdown

from mlcawq.evaluate.metrics import estimate

SCRIPTS = Path(__file__).parents[2] / "scripts"

# A peer that takes a fraction off every linear's weights, as a runner written with jobs.py; it
# fails on the job's tokens, names or bits if they are not what was asked for.
FAKE = """
import sys
sys.path.insert(0, {peers!r})
from pathlib import Path
from jobs import CannotError, do_job
from safetensors.torch import load_file

def shrink(job, factor=0.97):
    if job["bits"] == 2:
        raise CannotError("not with 2 bits")
    assert len(job["tokens"]) == 4 and len(job["tokens"][0]) == 32 and job["group_size"] == 64
    Path("log.txt").write_text("peers do that")
    tensors = load_file(Path(job["model"]) / "model.safetensors")
    return {{
        name: tensor.float() * factor if "_proj" in name else tensor.float()
        for name, tensor in tensors.items()
    }}

do_job({{"shrink": shrink, "shrink more": lambda job: shrink(job, 0.9)}})
"""


class Fake(Runner):
    name = "Fake"
    python = Path(sys.executable)
    methods: ClassVar = {"Fake": "shrink"}


class FakeOurs(Ours):
    methods: ClassVar = {"rtn": "shrink more"}


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "fake_runner.py"
    path.write_text(FAKE.format(peers=str(SCRIPTS / "peers")))
    return str(path)


@pytest.fixture
def fake(script: str) -> Fake:
    runner = Fake()
    runner.script = script
    return runner


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "model": "llama",
        "variant": "as it is",
        "bits": 3,
        "method": "awq+gptq",
        "ours": True,
        "setting": "a",
        "version": "1",
        "release": "mlcawq 1",
    }
    return Cell(**{**values, **changes})


def result(kl: np.ndarray, seconds: float = 3.0, **changes: Any) -> Result:
    return Result(cell(**changes), seconds, Score.of(kl, 20.5, 20.25, 0.875))


KL = np.random.default_rng(0).uniform(0.005, 0.02, 1000)


def test_a_job_is_done_in_a_process_of_its_own_and_once(
    fake: Fake, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 390, (4, 32))
    ours = FakeOurs()
    ours.script = script
    monkeypatch.setattr(compare_methods, "version_of", lambda runner: (runner.name, "1"))
    contenders = [Contender("rtn", ours), Contender("Fake", fake)]
    subject = Subject("tiny", "as it is", model, Setting(64, tokens, tokens[:, :24]))
    store = Store(tmp_path / "store" / "results.jsonl")
    found = list(compare([subject], [4, 2], contenders, store))
    ours4, fake4, ours2, fake2 = found
    assert ours4.score is not None
    assert fake4.score is not None
    assert 0 < fake4.score.millinats.mean < ours4.score.millinats.mean < 1e3
    assert (ours2.score, fake2.reason) == (None, "not with 2 bits")
    (duel,) = duels(found)
    assert (duel.bits, duel.ours, duel.peer) == (4, "rtn", "Fake")
    difference = ours4.score.millinats.mean - fake4.score.millinats.mean
    assert duel.difference == pytest.approx(difference, rel=1e-6)

    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("measured again"))
    assert list(compare([subject], [4, 2], contenders, store)) == found

    # Of another version, the store has nothing that counts, unless one only wants to look.
    monkeypatch.setattr(compare_methods, "version_of", lambda _: ("newer", "2"))
    looked = list(compare([subject], [4, 2], contenders, store, measuring=False))
    assert looked == found
    monkeypatch.setattr(compare_methods, "measure", lambda *_: result(KL, seconds=7))
    assert [one.seconds for one in compare([subject], [4], contenders, store)] == [7, 7]


def test_cells_differ_by_what_they_depend_on(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_methods, "version_of", lambda runner: (runner.name, "1"))
    models = [make_tiny_model(tmp_path / name, name) for name in ("llama", "qwen2")]
    tokens = np.random.default_rng(0).integers(3, 390, (4, 32))
    settings = [Setting(64, tokens, tokens[:, :24]), Setting(64, tokens[:3], tokens[:, :24])]
    ours = Contender("awq", Ours()), Contender("awq, symmetric clips", Ours())
    cells = [
        Subject("tiny", "as it is", model, setting).cell(contender, bits)
        for model in models
        for setting in settings
        for contender in (*ours, Contender("Fake", fake))
        for bits in (3, 4)
    ]
    assert len({cell.setting for cell in cells}) == len(cells)


def test_a_failure_is_no_result(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_methods, "version_of", lambda runner: (runner.name, "1"))
    model = make_tiny_model(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 390, (3, 32))  # the fake wants four
    subject = Subject("tiny", "as it is", model, Setting(64, tokens, tokens[:, :24]))
    store = Store(tmp_path / "results.jsonl")
    (found,) = compare([subject], [4], [Contender("Fake", fake)], store)
    assert (found.score, found.reason) == (None, "failed")
    assert "AssertionError" in capsys.readouterr().err
    assert store.results() == []


def test_the_store_gives_back_what_it_took(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    whole = result(KL)
    dash = Result(cell(method="X"), reason="not with 2 bits")
    store.add(whole)
    store.add(dash)
    assert store.results() == [whole, dash]
    assert whole.score is not None
    kept, exact = whole.score.millinats, estimate(1e3 * KL)
    assert kept.mean == pytest.approx(exact.mean)
    assert kept.standard_error == pytest.approx(exact.standard_error)


def test_a_checkpoint_with_a_tensor_missing_or_misshapen_is_not_written(tmp_path: Path) -> None:
    from peers.jobs import write_checkpoint
    from safetensors.torch import load_file

    model = make_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="up_proj"):
        write_checkpoint(model, tmp_path / "a", {**tensors, name: tensors[name].T})
    del tensors[name]
    with pytest.raises(KeyError, match="up_proj"):
        write_checkpoint(model, tmp_path / "b", tensors)


def test_absent_peers_are_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for peer in PEERS:
        monkeypatch.setenv(f"MLCAWQ_{peer.key.upper()}_PYTHON", str(tmp_path / "nowhere"))
    contenders, absent = find_contenders()
    assert [contender.label for contender in contenders] == list(Ours.methods)
    assert len(absent) == len(PEERS)
    for peer, said in zip(PEERS, absent, strict=True):
        assert f"scripts/peers/setup_{peer.key}.sh" in said
        assert (SCRIPTS / "peers" / f"setup_{peer.key}.sh").is_file()
        assert (SCRIPTS / "peers" / f"{peer.key}_runner.py").is_file()

    contenders, absent = find_contenders(only="ours")
    assert all(contender.ours for contender in contenders)
    assert absent == []
    contenders, absent = find_contenders(["awq", "AutoRound"])
    assert [contender.label for contender in contenders] == ["awq"]
    assert len(absent) == 1
    with pytest.raises(UserError, match="no method is left"):
        find_contenders(["AutoRound"])
    with pytest.raises(UserError, match=r"no such method: Awq.*"):
        find_contenders(["Awq"])


def test_a_peer_named_on_the_command_line_is_taken(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.touch()
    arguments = parse(["--gptqmodel", str(python), "--methods", "GPTQModel GPTQ"])
    (contender,), absent = find_contenders(
        arguments.methods, {peer.key: getattr(arguments, peer.key) for peer in PEERS}
    )
    assert contender.runner.python == python
    assert absent == []


def test_lines_of_the_table_stand_under_the_header() -> None:
    said, dash = line(result(KL)), line(Result(cell(bits=2), reason="4 bits only"))
    width = len(HEADER)
    assert len(said) == width
    assert f"{1e3 * KL.mean():.3f} ± 0." in said
    assert "20.5 (20.25)" in said
    assert "87.50%" in said
    assert dash[:width].split()[-4:] == ["-"] * 4
    assert dash.endswith("4 bits only")


def test_our_best_is_paired_with_each_peer_and_awq_with_awq() -> None:
    found = duels(
        [
            result(KL + 0.02, method="rtn"),
            result(KL + 0.003, method="awq"),
            result(KL, method="awq+gptq"),
            result(KL + 0.004, method="AutoAWQ", ours=False),
            Result(cell(method="GPTQModel AWQ", ours=False), reason="4 bits only"),
            result(KL, method="awq", bits=4),
        ]
    )
    assert [(duel.bits, duel.ours, duel.peer) for duel in found] == [
        (3, "awq+gptq", "AutoAWQ"),
        (3, "awq", "AutoAWQ"),
    ]
    assert [duel.difference for duel in found] == pytest.approx([-4, -1])
    # Paired: what both share does not count.
    assert [duel.error for duel in found] == pytest.approx([0, 0], abs=1e-9)
    assert "3 bits: KL of awq - KL of AutoAWQ = -1.000" in str(found[1])


def test_markdown_has_a_column_a_model_and_the_least_in_bold() -> None:
    lines = list(
        markdown(
            [
                result(np.full(100, 0.002)),
                Result(cell(method="X", ours=False), reason="no"),
                result(np.full(100, 0.003), method="AutoAWQ", ours=False),
                result(np.full(100, 0.5), variant="outliers x16"),
            ]
        )
    )
    assert lines == [
        "| KL divergence at 3 bits, millinats a token | llama | … outliers x16 |",
        "|---|---:|---:|",
        "| awq+gptq | **2** | **500** |",
        "| X | – |  |",
        "| AutoAWQ | 3 |  |",
        "",
    ]


@pytest.mark.peers
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.key)
def test_a_peer_rounds_to_its_grid_and_nothing_else(peer: type[Peer], tmp_path: Path) -> None:
    try:
        runner = peer()
    except UserError as error:
        pytest.skip(str(error))
    model = make_tiny_model(tmp_path / "model")
    readable = runner.readable(model, tmp_path / "readable")
    tokens = np.random.default_rng(0).integers(3, 390, (8, 64))
    before = TensorReader(model)
    for label, method in runner.methods.items():
        out = tmp_path / label
        job = {
            "task": "quantize",
            "method": method,
            "model": str(readable),
            "tokens": tokens.tolist(),
            "bits": 4,
            "group_size": 64,
            "pack": False,
            "out": str(out),
        }
        assert runner.run(job)["seconds"] > 0
        after = TensorReader(out)
        for name in before.names:
            if "_proj" not in name or method == "awq":
                continue  # AWQ moves scales between tensors
            groups = torch.from_numpy(after.numpy(name).astype(np.float32)).reshape(-1, 64)
            assert max(len(group.unique()) for group in groups) <= 16, (label, name)
        for name in before.names:
            changed = not np.array_equal(after.numpy(name), before.numpy(name))
            assert not ("embed" in name and changed), (label, name)
            assert changed or "_proj" not in name, (label, name)


def test_json_holds_results_and_duels(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    tokens = np.random.default_rng(0).integers(3, 390, (4, 32))
    setting = Setting(64, tokens, tokens[:, :24])
    monkeypatch.setattr(compare_methods, "version_of", lambda runner: (runner.name, "1"))
    monkeypatch.setattr(compare_methods, "load_setting", lambda *_: setting)
    monkeypatch.setattr(
        compare_methods, "find_contenders", lambda *_: ([Contender("Fake", fake)], ["no X"])
    )
    (tmp_path / "heldout.txt").touch()
    options = ["--bits", "4", "2", "--variants", "plain", "--json"]
    store = ["--store", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", str(model), *options, *store])
    compare_methods.main()
    document = json.loads(capsys.readouterr().out)
    assert [found["cell"]["model"] for found in document["results"]] == ["tiny", "tiny"]
    assert document["results"][1]["reason"] == "not with 2 bits"
    assert document["absent"] == ["no X"]
    assert document["duels"] == []

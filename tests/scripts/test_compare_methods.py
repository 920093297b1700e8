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
from compare_awq import Row, Setting
from compare_methods import Contender, Dash, compare, duels, find_contenders, line, parse
from peers.runners import PEERS, Ours, Peer, Runner

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


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "variant": "as it is",
        "bits": 3,
        "method": "awq+gptq",
        "kl": 12.3456,
        "kl_error": 0.25,
        "perplexity": 20.5,
        "reference_perplexity": 20.25,
        "top1": 0.875,
        "seconds": 3.0,
    }
    return Row(**{**values, **changes})


def test_a_job_is_done_in_a_process_of_its_own(fake: Fake, script: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 390, (4, 32))
    setting = Setting(64, tokens, tokens[:, :24])
    ours = FakeOurs()
    ours.script = script
    contenders = [Contender("rtn", ours), Contender("Fake", fake)]
    result = compare({"as it is": model}, [4, 2], setting, contenders, tmp_path / "work")
    ours4, fake4, _, fake2 = result.rows
    assert isinstance(ours4, Row)
    assert isinstance(fake4, Row)
    assert 0 < fake4.kl < ours4.kl < 1e3
    assert fake2 == Dash("as it is", 2, "Fake", "not with 2 bits")
    (duel,) = result.duels
    assert (duel.bits, duel.ours, duel.peer) == (4, "rtn", "Fake")
    assert duel.difference == pytest.approx(ours4.kl - fake4.kl, rel=1e-6)

    before, after = (
        TensorReader(path) for path in (model, tmp_path / "work" / "as it is, Fake, 4 bits")
    )
    assert set(after.names) == set(before.names)
    for name in before.names:
        stored, expected = after.numpy(name), before.numpy(name).astype(np.float32)
        assert stored.dtype == np.float16
        factor = np.float32(0.97 if "_proj" in name else 1)
        np.testing.assert_array_equal(stored, (expected * factor).astype(np.float16))
    assert not list(Path.cwd().glob("log.txt"))


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
    said, dash = line(row()), line(Dash("as it is", 2, "GPTQModel AWQ", "4 bits only"))
    width = len(compare_methods.HEADER)
    assert len(said) == width
    assert "12.346 ± 0.250" in said
    assert "20.5 (20.25)" in said
    assert "87.50%" in said
    assert dash[:width].split()[-4:] == ["-"] * 4
    assert dash.endswith("4 bits only")


def test_our_best_is_paired_with_each_peer() -> None:
    ours, peer = Ours(), Fake()
    base = np.random.default_rng(0).uniform(0.01, 0.1, 500)
    found = duels(
        "as it is",
        4,
        {
            Contender("rtn", ours): base + 0.02,
            Contender("awq", ours): base,
            Contender("Fake", peer): base + 0.001,
        },
    )
    (duel,) = found
    assert (duel.ours, duel.peer) == ("awq", "Fake")
    assert duel.difference == pytest.approx(-1)
    assert duel.error == pytest.approx(0, abs=1e-9)  # paired: what both share does not count
    assert "awq - KL of Fake = -1.000" in str(duel)


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


def test_json_holds_rows_dashes_and_duels(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 390, (4, 32))
    setting = Setting(64, tokens, tokens[:, :24])
    monkeypatch.setattr(compare_methods, "prepare", lambda _: setting)
    monkeypatch.setattr(
        compare_methods, "find_contenders", lambda *_: ([Contender("Fake", fake)], ["no X"])
    )
    command = [
        "compare_methods.py",
        str(model),
        "--bits",
        "4",
        "2",
        "--variants",
        "plain",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", command)
    compare_methods.main()
    document = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in document["rows"]] == ["Fake", "Fake"]
    assert document["rows"][1]["reason"] == "not with 2 bits"
    assert document["absent"] == ["no X"]
    assert document["duels"] == []

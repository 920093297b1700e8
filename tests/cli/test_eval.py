"""`mlcawq eval` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. Water boils at 100 degrees. " * 20


def _eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlcawq", "eval", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_two_checkpoints_and_questions(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What?", "answer": "impossible"}\n')
    arguments = (tiny_llama, "--text", text, "--against", other, "--window", 128)
    found = _eval(*arguments, "--questions", questions, "--max-new-tokens", 4, "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["text"]["window"] == 128
    assert report["text"]["tokens"] == 127 * report["text"]["windows"]
    assert report["text"]["divergence"]["kl"]["mean"] > 0.1
    assert report["questions"]["right"] == 0
    assert report["questions"]["wrong"][0]["answer"] == "impossible"
    assert report["against_questions"]["total"] == 1

    table = _eval(*arguments)
    assert table.returncode == 0
    perplexity = report["text"]["model"]["perplexity"]
    assert perplexity > 1e6, "of a random model: shown with an exponent"
    assert f"perplexity                {perplexity:.4e}" in table.stdout
    assert "millinats/token" in table.stdout


def test_threads_are_those_of_torch_and_of_tvm() -> None:
    """What `evaluate` finds when it begins: both libraries read it at their first kernel."""
    code = (
        "import sys\n"
        "import mlcawq.evaluate.run as run\n"
        "def evaluate(request, progress):\n"
        "    import torch\n"
        "    from mlcawq.engine.runtime_only import import_tvm_runtime\n"
        "    import_tvm_runtime()\n"
        "    from mlcawq.engine.threads import choose_threads\n"
        "    print(torch.get_num_threads(), choose_threads(None))\n"
        "    sys.exit(0)\n"
        "run.evaluate = evaluate\n"
        "sys.argv = ['mlcawq', 'eval', 'model', '--text', 'text', '--threads', '1']\n"
        "from mlcawq.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code]
    names = ("OMP_NUM_THREADS", "TVM_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (found.stdout, found.returncode) == ("1 1\n", 0), found.stderr


def test_all_problems_come_at_once(tmp_path: Path, tiny_llama: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    found = _eval(
        *(nothing, "--text", empty, "--against", tmp_path / "absent"),
        *("--questions", tmp_path / "no.jsonl"),
    )
    assert found.returncode == 1
    assert found.stdout == ""
    for part in ("the file is empty", "no.jsonl", "neither mlc-chat-config.json", "absent"):
        assert part in found.stderr


def test_a_text_shorter_than_the_window(tiny_llama: Path, text: Path) -> None:
    found = _eval(tiny_llama, "--text", text, "--max-tokens", 100, "--window", 200)
    assert found.returncode == 1
    assert "100 tokens are fewer than one window of 200" in found.stderr


def test_different_vocabularies_are_refused(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {
        f"{token}x" if i == 300 else token: i for token, i in raw["model"]["vocab"].items()
    }
    raw["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(raw))
    found = _eval(tiny_llama, "--text", text, "--against", other)
    assert found.returncode == 1
    assert "the vocabularies differ" in found.stderr


def test_a_missing_chat_template_is_told_before_text_is_scored(text: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", chat_template=False)
    (model / "model.safetensors").unlink()
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What?", "answer": "impossible"}\n')
    found = _eval(model, "--text", text, "--questions", questions)
    assert found.returncode == 1
    assert "no chat template" in found.stderr
    assert found.stderr.count("no safetensors weights") == 1


def test_nothing_to_do_is_a_usage_error(tiny_llama: Path) -> None:
    assert _eval(tiny_llama).returncode == 2

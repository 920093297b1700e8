"""An interpreter with mlc_llm that is none: a script that answers the probe and plays the steps."""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path
from typing import Any

from mlcawq.build.via_mlc.interpreter import MARK

# What a good environment says, in the order in which the probe says it.
FACTS: list[dict[str, Any]] = [
    {"python": [3, 11, 7], "executable": "python", "nvcc": "/usr/bin/nvcc"},
    {
        "installed": True,
        "has_tvm": True,
        "versions": {
            "apache-tvm": "0.26.0",
            "apache-tvm-ffi": "0.1.14.post1",
            "torch": "2.9.0",
            "safetensors": "0.6.2",
            "transformers": "4.57.0",
            "numpy": "2.3.0",
        },
        "requires": {"apache-tvm": ["apache-tvm-ffi>=0.1.13.post2", "numpy"]},
    },
    {
        "mlc_llm": "0.20.0",
        "mlc_llm_path": "/somewhere/mlc_llm",
        "mlc_llm_distributions": [],
        "module": "/somewhere/libmlc_llm_module.so",
        "models": ["llama", "mistral", "qwen2", "gemma2"],
        "awq_models": ["llama"],
        "quantizations": ["q0f16", "q0f32", "q4f16_1", "q3f16_1", "q4f16_autoawq"],
        "conv_templates": ["chatml", "llama-3", "LM", "olmo"],
        "options": {
            "gen_config": ["--model-type", "--attention-sink-size", "--output", "-o"],
            "convert_weight": ["--model-type", "--device"],
            "compile": ["--opt", "--overrides", "--debug-dump", "--device"],
        },
        "names_wanted": ["tirx"],
    },
    {"stage": "import tvm"},
    {
        "tvm": "0.26.0",
        "tvm_path": "/somewhere/tvm/__init__.py",
        "tvm_ffi": "0.1.14.post1",
        "generators": ["c", "cuda", "llvm", "metal", "opencl", "webgpu"],
        "devices": ["cpu", "cuda"],
        "names_present": ["tirx", "s_tir"],
    },
    {"stage": "import mlc_llm"},
    {"imports": True},
]

_SCRIPT = """#!{python} -S
import json, os, shutil, signal, subprocess, sys, time
home = os.path.dirname(os.path.abspath(__file__))

def read(name):
    with open(os.path.join(home, name)) as stream:
        return json.load(stream)

if sys.argv[1] == "-c":
    plan = read("probe.json")
    for line in plan["lines"]:
        print({mark!r} + json.dumps(line), flush=True)
    if plan["end"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if plan["end"]:
        sys.exit(plan["end"])
    sys.exit(0)

step = next(w for w in sys.argv if w in ("gen_config", "convert_weight", "compile"))
with open(os.path.join(home, "calls.jsonl"), "a") as stream:
    stream.write(json.dumps(sys.argv[1:]) + "\\n")
out = sys.argv[sys.argv.index("--output") + 1]
play = read("plays.json").get(step, "well")
print(step, "begins", flush=True)
if "mlcawq-step-" in os.environ.get("TMPDIR", ""):
    with open(os.path.join(os.environ["TMPDIR"], "left-behind"), "w") as stream:
        stream.write("as a step that is killed leaves it")
if play == "hangs":
    # So does something that it started, as nvcc would.
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with open(os.path.join(home, "pids.json"), "w") as stream:
        json.dump([os.getpid(), child.pid], stream)
    print("hanging", flush=True)
    if read("plays.json").get("stubborn"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
if play == "fails":
    print("\\033[91mcompiling\\033[0m 1%\\rcompiling 99%")
    print("Traceback (most recent call last):\\n  File x", file=sys.stderr)
    print("ValueError: no such layer", file=sys.stderr)
    sys.exit(1)
if play == "floods":
    for i in range(20000):
        print("line", i, "x" * 50)
    sys.stdout.write("y" * 10**6)
    sys.exit(3)
if play == "misunderstands":
    print("-" * 25 + " Usage " + "-" * 25 + "\\nusage: ...\\n" + "-" * 25 + " Error " + "-" * 25)
    print("argument --opt: invalid value: 'O9'", file=sys.stderr)
    sys.exit(2)
if play == "complains":
    print("error: config.json: group_size 48 is odd\\n  -> quantize again", file=sys.stderr)
    sys.exit(1)
if play == "lacks":
    print("ModuleNotFoundError: No module named 'fast_api.x'", file=sys.stderr)
    sys.exit(1)
if play == "full":
    print("OSError: [Errno 28] No space left on device", file=sys.stderr)
    sys.exit(1)
if play == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if play == "leaves":
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
if play == "nothing":
    sys.exit(0)
like = read("plays.json").get("like")
if step == "compile":
    if like:
        shutil.copy(os.path.join(like, "lib-cpu.so"), out)
    else:
        with open(out, "wb") as stream:
            stream.write(b"library")
elif like:
    for name in os.listdir(like):
        weights = name.startswith(("params_shard", "tensor-cache"))
        if weights == (step == "convert_weight") and not name.endswith(".so"):
            shutil.copy(os.path.join(like, name), out)
elif step == "gen_config":
    given = sys.argv[sys.argv.index("--conv-template") + 1]
    if os.path.isfile(given):
        with open(given) as stream:
            given = json.load(stream)
    config = {{"model_type": "llama", "conv_template": given, "context_window_size": 64,
               "prefill_chunk_size": 32, "model_config": {{"max_batch_size": 2}},
               **read("plays.json").get("config", {{}})}}
    with open(os.path.join(out, "mlc-chat-config.json"), "w") as stream:
        json.dump(config, stream)
else:
    with open(os.path.join(out, "params_shard_0.bin"), "wb") as stream:
        stream.write(bytes(1000))
    with open(os.path.join(out, "tensor-cache.json"), "w") as stream:
        json.dump({{"metadata": {{"BitsPerParam": 16.0}}, "records": []}}, stream)
print(step, "is done", flush=True)
"""


class FakeMlc:
    """The script in `folder`; `python` is its path."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.python = folder / "python"
        self.python.write_text(_SCRIPT.format(python=sys.executable, mark=MARK))
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        self.answers()
        self.plays()

    def answers(self, *, end: int | str = 0, until: str = "", **changed: Any) -> None:
        """Answer the probe with FACTS, some of them changed, up to a stage, with that ending."""
        lines = []
        for facts in FACTS:
            lines.append({key: changed.get(key, value) for key, value in facts.items()})
            if until and facts.get("stage") == until:
                break
        (self.folder / "probe.json").write_text(json.dumps({"lines": lines, "end": end}))

    def plays(self, **steps: Any) -> None:
        """How each step goes: "well" where it is not named. like: a folder whose files are made;
        config: more keys of mlc-chat-config.json.
        """
        (self.folder / "plays.json").write_text(json.dumps(steps))

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every step that was run."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def pids(self) -> list[int]:
        """The processes of a step that hangs."""
        return list(json.loads((self.folder / "pids.json").read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended, be it as a zombie that nobody has asked for yet."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False

"""Arguments of mlc_llm's steps: what is built, what is passed on, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from fake_mlc import FakeMlc

from mlcawq.build.via_mlc import commands, targets
from mlcawq.build.via_mlc.commands import Extra, Program, check_extra, parse_extra, typed
from mlcawq.build.via_mlc.interpreter import MlcInterpreter, find_mlc
from mlcawq.errors import UserError


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> MlcInterpreter:
    return find_mlc(FakeMlc(tmp_path_factory.mktemp("mlc") / "bin").python)


def test_how_mlc_llm_is_started(interpreter: MlcInterpreter) -> None:
    python = str(interpreter.python)
    assert Program(interpreter, True).words("compile") == [
        python,
        str(commands.PLUGIN),
        "compile",
    ]
    assert commands.PLUGIN.is_file()
    assert Program(interpreter, False).words("compile") == [python, "-m", "mlc_llm", "compile"]
    # Without its compiled module mlc_llm does not start of itself.
    bare = dataclasses.replace(interpreter, imports=False)
    assert Program(bare, False).words("compile") == [
        python,
        str(commands.PLUGIN),
        "--stock",
        "compile",
    ]


def test_the_arguments_of_each_step(interpreter: MlcInterpreter) -> None:
    plugin, stock = Program(interpreter, True), Program(interpreter, False)
    words = commands.gen_config(
        plugin,
        Path("/models/my model"),
        Path("/out"),
        "q4f16_autoawq_g64",
        Path("/tmp/conversation.json"),
        weight_layout="n16k64",
        context_window_size=512,
        max_batch_size=2,
        extra=["--attention-sink-size", "4"],
    )
    assert words[2:] == shlex.split(
        "gen_config '/models/my model' --quantization q4f16_autoawq_g64 "
        "--conv-template /tmp/conversation.json --weight-layout n16k64 --context-window-size 512 "
        "--max-batch-size 2 --output /out --attention-sink-size 4"
    )
    words = commands.convert_weight(
        stock, Path("/m"), "/out", "q4f16_autoawq", awq_source=Path("/m/x"), weight_layout="autoawq"
    )
    assert words[2:] == shlex.split(
        "mlc_llm convert_weight /m --quantization q4f16_autoawq --source-format awq "
        "--source /m/x --device cpu --output /out"
    )
    words = commands.convert_weight(plugin, Path("/m"), "/out", "q4f16_1")
    assert words[2:] == shlex.split(
        "convert_weight /m --quantization q4f16_1 --source-format huggingface-safetensor "
        "--output /out"
    )
    words = commands.compile_(plugin, "/out", "/out/lib.so", "metal", extra=["--opt", "O3"])
    assert words[2:] == shlex.split("compile /out --device metal --output /out/lib.so --opt O3")


def test_a_command_is_shown_as_one_types_it() -> None:
    assert typed(["a b", "--x", '{"kind": "llvm"}']) == "'a b' --x '{\"kind\": \"llvm\"}'"
    assert typed(["--conv-template", commands.CONVERSATION]) == '--conv-template "$conversation"'


def test_arguments_are_split_as_a_shell_does() -> None:
    extra = parse_extra("--attention-sink-size 4", "", "--opt 'O3; cutlass=1' --debug-dump d")
    assert extra == Extra(
        ("--attention-sink-size", "4"), (), ("--opt", "O3; cutlass=1", "--debug-dump", "d")
    )
    assert not extra.names_model_type()
    assert parse_extra("--model-type llama").names_model_type()


def test_what_mlcawq_sets_itself_is_not_passed_on() -> None:
    with pytest.raises(UserError) as error:
        parse_extra("--output /x --conv-template=LM", "'open", "--device cuda")
    message = str(error.value)
    assert "--gen-config-args: --output is not passed on\n  -> mlcawq has -o for it" in message
    assert "--conv-template=LM is not passed on" in message
    assert "cannot be split into words" in message
    assert "--compile-args: --device is not passed on\n  -> mlcawq has --target for it" in message
    # The device that quantizes is another matter.
    check_extra("convert_weight", ["--device", "cuda"], "--")


def test_targets_of_ours_become_devices(interpreter: MlcInterpreter) -> None:
    cpu = targets.resolve("cpu", interpreter, plugin=True)
    assert (cpu.kind, cpu.library) == ("cpu", "lib-cpu.so")
    device = json.loads(cpu.device)
    # The host is the same processor; mlc_llm would guess another.
    assert device["host"] == {key: value for key, value in device.items() if key != "host"}
    cuda = targets.resolve("cuda:sm_90", interpreter, plugin=True)
    assert (cuda.kind, cuda.library) == ("cuda", "lib-cuda.so")
    assert json.loads(cuda.device)["arch"] == "sm_90a"
    vulkan = targets.resolve("vulkan:portable", interpreter, plugin=True)
    assert (vulkan.kind, vulkan.library) == ("vulkan", "lib-vulkan.so")
    assert json.loads(vulkan.device)["kind"] == "webgpu"
    written = targets.resolve('{"kind":"llvm"}', interpreter, plugin=True)
    # mlc_llm takes a text with one colon and no space for a device's name.
    assert " " in written.device
    assert written.kind == "cpu"


def test_a_tvm_with_vulkan_uses_it(interpreter: MlcInterpreter) -> None:
    able = dataclasses.replace(interpreter, generators=("llvm", "vulkan"))
    assert targets.resolve("vulkan", able, plugin=True).device == "vulkan"
    portable = targets.resolve("vulkan:portable", able, plugin=False)
    assert (portable.device, portable.library) == ("vulkan:generic", "lib-vulkan.so")
    assert portable.kind == "vulkan"
    given = '{"kind": "vulkan", "supports_float16": true}'
    assert targets.resolve(given, able, plugin=True).device == given


@pytest.mark.parametrize(
    ("asked", "device", "library"),
    [
        ("metal", "metal", "lib-metal.so"),
        ("metal:x86-64", "metal:x86-64", "lib-metal-x86-64.dylib"),
        ("iphone", "iphone", "lib-iphone.tar"),
        ("android:adreno-so", "android:adreno-so", "lib-android-adreno-so.so"),
        ("android:adreno", "android:adreno", "lib-android-adreno.tar"),
        ("webgpu", "webgpu", "lib-webgpu.wasm"),
        ("opencl -device=mali", "opencl -device=mali", "lib-opencl-device-mali.so"),
        ("nvidia/jetson-orin", "nvidia/jetson-orin", "lib-nvidia-jetson-orin.so"),
        ('{"kind":"metal","thread_warp_size":32}', None, "lib-metal.so"),
    ],
)
def test_words_of_mlc_llm_pass_through(
    asked: str, device: str | None, library: str, interpreter: MlcInterpreter
) -> None:
    target = targets.resolve(asked, interpreter, plugin=True)
    assert target.device == (device or json.dumps(json.loads(asked)))
    assert (target.library, target.kind) == (library, "")


@pytest.mark.parametrize(
    ("asked", "plugin", "message"),
    [
        ("cdua", True, "did you mean cuda?"),
        ("cdua:sm_90", True, "did you mean cuda:sm_90?"),
        ("auto", True, "target 'auto' is not known"),
        ("cuda:sm_1", True, "names no GPU architecture"),
        ("vulkan:x", True, "target vulkan:x is not known"),
        ('{"kind": "llvm"', True, "is not valid JSON"),
        ("rocm", True, "generates no code for rocm"),
        ("vulkan", False, "built without Vulkan"),
        ('{"kind": "rocm"}', True, "generates no code for rocm"),
    ],
)
def test_targets_that_cannot_be(
    asked: str, plugin: bool, message: str, interpreter: MlcInterpreter
) -> None:
    with pytest.raises(UserError) as error:
        targets.resolve(asked, interpreter, plugin=plugin)
    assert message in str(error.value)


def test_compilers_that_lack_are_seen_before(
    interpreter: MlcInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "NVCC"):
        monkeypatch.delenv(name, raising=False)
    cuda = targets.resolve("cuda:sm_80", interpreter, plugin=True)

    def check(compiler: str, *, plugin: bool) -> str:
        there = dataclasses.replace(interpreter, cuda_compiler=compiler)
        try:
            targets.check_compilers(cuda, there, plugin=plugin)
        except UserError as error:
            return str(error)
        return ""

    assert check("/usr/bin/nvcc", plugin=False) == ""
    assert check("nvidia-cuda-nvrtc", plugin=True) == ""
    assert "compiles CUDA with nvcc" in check("nvidia-cuda-nvrtc", plugin=False)
    assert "pip install 'cuda-toolkit[cccl,crt,cudart,nvrtc]" in check("", plugin=True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in check("nvidia-cuda-nvrtc", plugin=True)
    wasm = targets.resolve("webgpu", interpreter, plugin=True)
    targets.check_compilers(wasm, interpreter, plugin=True)

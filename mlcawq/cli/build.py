"""`mlcawq build` and its three steps: gen-config, convert-weight, compile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlcawq.cli import via_mlc
from mlcawq.cli.via_mlc import (
    Arguments,
    DryRun,
    MlcPython,
    NoPlugin,
    Via,
    ViaOptions,
    more_arguments,
)

if TYPE_CHECKING:
    from mlcawq.build.pipeline import BuildResult, Reporter

Checkpoint = Annotated[
    str, typer.Argument(help="Hugging Face checkpoint, plain or AWQ: a folder or a hub name.")
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        help="cpu, cpu:native, cpu:LEVEL, cuda, cuda:sm_XX, vulkan, vulkan:portable, or a TVM "
        "target of kind llvm, cuda, webgpu or vulkan in JSON.",
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help="q0f16, q0f32, q4f16_autoawq[_g64|_g32], or q4f32_autoawq[_g64|_g32] for devices "
        "without float16.  [default: what the checkpoint is]",
    ),
]
_LAYOUT_HELP = (
    "How 4-bit weights lie: autoawq (stock, runs on every target), n16k64 (GPUs) or n16k8 (CPUs)."
)
Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        help="How the output head is stored, and the embedding with it: float16, or for CPUs int8 "
        "or int4.  [default: int8 beside weights in n16k8, else float16]",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="What 4-bit weights in n16k8 are multiplied by: int16, as good as float16, or int8, "
        "which reads prompts faster and costs some accuracy.  [default: int16]",
    ),
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        help="How a CPU keeps keys and values: auto, as activations are, or int8, which takes "
        "little more than half of the memory.  [default: auto]",
    ),
]
ConvTemplate = Annotated[
    str | None,
    typer.Option(
        "--conv-template",
        help="A shipped conversation template, by its name or mlc_llm's, or a JSON file.  "
        "[default: found from the model's own chat template]",
    ),
]
BuildLayout = Annotated[
    str | None,
    typer.Option("--weight-layout", help=f"{_LAYOUT_HELP}  [default: the target's fastest]"),
]
ConfigLayout = Annotated[
    str | None,
    typer.Option(
        "--weight-layout",
        help=f"{_LAYOUT_HELP}  [default: the folder's, where it has one; autoawq]",
    ),
]
ConvertLayout = Annotated[
    str | None,
    typer.Option(
        "--weight-layout",
        help=f"{_LAYOUT_HELP}  [default: what mlc-chat-config.json in the output says]",
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context-window-size", help="Tokens of a sequence.  [default: the model's]"),
]
Chunk = Annotated[
    int | None,
    typer.Option("--prefill-chunk-size", help="Tokens of a prompt run at once.  [default: 2048]"),
]
Batch = Annotated[
    int | None,
    typer.Option("--max-batch-size", help="Sequences decoded at once.  [default: 4]"),
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Read pickle files where there are no safetensors."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def build(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    target: Target = "cpu",
    quantization: Quantization = None,
    weight_layout: BuildLayout = None,
    head: Head = None,
    activations: Activations = None,
    kv_cache_dtype: KvCacheDtype = None,
    conv_template: ConvTemplate = None,
    context_window_size: Context = None,
    prefill_chunk_size: Chunk = None,
    max_batch_size: Batch = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the library's logits with the checkpoint's, and fail where they differ."
            "  [default: all layers below 2B parameters, three of them above]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is there.")
    ] = False,
    trust_pickle: TrustPickle = False,
    revision: Revision = None,
    via: Via = None,
    mlc_python: MlcPython = None,
    no_plugin: NoPlugin = False,
    dry_run: DryRun = False,
    gen_config_args: Annotated[str, more_arguments("gen-config")] = "",
    convert_weight_args: Annotated[str, more_arguments("convert-weight")] = "",
    compile_args: Annotated[str, more_arguments("compile")] = "",
    json_output: Json = False,
) -> None:
    """Build a checkpoint into a model folder that chats: config, weights, library, verified.

    The folder appears whole or not at all.
    """
    options = ViaOptions(via, mlc_python, no_plugin, dry_run)
    options.check(
        gen_config_args=gen_config_args,
        convert_weight_args=convert_weight_args,
        compile_args=compile_args,
    )
    from mlcawq.build.pipeline import BuildRequest
    from mlcawq.build.pipeline import build as run
    from mlcawq.checkpoint.source import resolve

    request = BuildRequest(
        target=target,
        quantization=quantization,
        weight_layout=weight_layout,
        head=head,
        activations=activations,
        kv_cache_dtype=kv_cache_dtype,
        conv_template=conv_template,
        context_window_size=context_window_size,
        prefill_chunk_size=prefill_chunk_size,
        max_batch_size=max_batch_size,
        verify=verify,
        overwrite=overwrite,
    )
    if via is not None:
        from mlcawq.build.via_mlc.commands import parse_extra

        extra = parse_extra(gen_config_args, convert_weight_args, compile_args)
        folder = resolve(checkpoint, trust_pickle=trust_pickle, revision=revision)
        asked = options.request(request, extra)
        through = via_mlc.build(folder, out, asked, dry_run=dry_run, json_output=json_output)
        if through is None:
            return
        result = through
    else:
        folder = resolve(checkpoint, trust_pickle=trust_pickle, revision=revision)
        with _Progress() as progress:
            result = run(folder, out, request, progress.reporter())
    if json_output:
        print(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_summary(result)))


def gen_config(
    checkpoint: Checkpoint,
    arguments: Arguments = None,
    *,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")],
    quantization: Quantization = None,
    weight_layout: ConfigLayout = None,
    head: Head = None,
    activations: Activations = None,
    kv_cache_dtype: KvCacheDtype = None,
    conv_template: ConvTemplate = None,
    context_window_size: Context = None,
    prefill_chunk_size: Chunk = None,
    max_batch_size: Batch = None,
    trust_pickle: TrustPickle = False,
    revision: Revision = None,
    via: Via = None,
    mlc_python: MlcPython = None,
    no_plugin: NoPlugin = False,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Write mlc-chat-config.json and the tokenizer files: step 1 of a build."""
    options = ViaOptions(via, mlc_python, no_plugin, dry_run)
    options.check_step(arguments)
    from mlcawq.build.pipeline import BuildRequest, generate_config
    from mlcawq.checkpoint.source import resolve

    request = BuildRequest(
        quantization=quantization,
        weight_layout=weight_layout,
        head=head,
        activations=activations,
        kv_cache_dtype=kv_cache_dtype,
        conv_template=conv_template,
        context_window_size=context_window_size,
        prefill_chunk_size=prefill_chunk_size,
        max_batch_size=max_batch_size,
    )
    if via is not None:
        from mlcawq.build.via_mlc import steps

        extra = via_mlc.step_arguments("gen_config", arguments)
        folder = resolve(checkpoint, trust_pickle=trust_pickle, revision=revision)
        step = steps.gen_config(folder, out, options.request(request, extra))
        via_mlc.run_step(step, dry_run=dry_run, json_output=json_output)
        return
    folder = resolve(checkpoint, trust_pickle=trust_pickle, revision=revision)
    generated = generate_config(folder, out, request)
    for message in generated.messages:
        print(message, file=sys.stderr)
    if json_output:
        print(json.dumps(generated.config, indent=2, ensure_ascii=False))
    else:
        print(out / "mlc-chat-config.json")


def convert_weight(
    checkpoint: Checkpoint,
    arguments: Arguments = None,
    *,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")],
    quantization: Quantization = None,
    weight_layout: ConvertLayout = None,
    head: Head = None,
    trust_pickle: TrustPickle = False,
    revision: Revision = None,
    via: Via = None,
    mlc_python: MlcPython = None,
    no_plugin: NoPlugin = False,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Convert the weights to tensor-cache.json and params_shard_*.bin: step 2 of a build."""
    options = ViaOptions(via, mlc_python, no_plugin, dry_run)
    options.check_step(arguments)
    from dataclasses import asdict

    from mlcawq.build.convert_weight import convert_weight as run
    from mlcawq.checkpoint.source import resolve

    folder = resolve(checkpoint, trust_pickle=trust_pickle, revision=revision)
    if via is not None:
        from mlcawq.build.pipeline import BuildRequest
        from mlcawq.build.via_mlc import steps

        extra = via_mlc.step_arguments("convert_weight", arguments)
        request = BuildRequest(quantization=quantization, weight_layout=weight_layout, head=head)
        step = steps.convert_weight(folder, out, options.request(request, extra))
        via_mlc.run_step(step, dry_run=dry_run, json_output=json_output)
        return
    with _Progress() as progress:
        conversion = run(
            folder,
            out,
            quantization,
            weight_layout=weight_layout,
            head=head,
            progress=progress.reporter().weights,
        )
    if json_output:
        print(json.dumps({"folder": str(out), **asdict(conversion)}, indent=2))
    else:
        print(
            f"{out / 'tensor-cache.json'}: {conversion.num_parameters} tensors, "
            f"{_size(conversion.total_bytes)}, {conversion.quantization}"
            + (f", layout {conversion.weight_layout}" if conversion.weight_layout else "")
        )


def compile_(
    model: Annotated[
        Path, typer.Argument(help="A folder with mlc-chat-config.json, or that file.")
    ],
    arguments: Arguments = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The library.  [default: lib-<target>.so in the folder]"
        ),
    ] = None,
    target: Target = "cpu",
    via: Via = None,
    mlc_python: MlcPython = None,
    no_plugin: NoPlugin = False,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Compile the model library for a target: step 3 of a build."""
    options = ViaOptions(via, mlc_python, no_plugin, dry_run)
    options.check_step(arguments)
    from mlcawq.build.pipeline import BuildRequest, compile_folder

    if via is not None:
        from mlcawq.build.via_mlc import steps

        extra = via_mlc.step_arguments("compile", arguments)
        step = steps.compile_(model, out, options.request(BuildRequest(target=target), extra))
        via_mlc.run_step(step, dry_run=dry_run, json_output=json_output)
        return

    with _Progress() as progress:
        library = compile_folder(model, out, target, progress.reporter())
    if json_output:
        content = {"library": str(library), "bytes": library.stat().st_size, "target": target}
        print(json.dumps(content, indent=2))
    else:
        print(f"{library}: {_size(library.stat().st_size)}")


class _Progress:
    """Stages and a bar of the weights on stderr; plain lines where that is no terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            Elapsed(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._bar.start()
        self._task: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def reporter(self) -> Reporter:
        from mlcawq.build.pipeline import Reporter

        progress = self

        class Console(Reporter):
            def stage(self, text: str) -> None:
                progress.stage(text)

            def message(self, text: str) -> None:
                progress.console.print(text, markup=False)

            def weights(self, name: str, done: int, total: int) -> None:
                progress.weights(done, total)

        return Console()

    def stage(self, text: str) -> None:
        self._end_task()
        if self.console.is_terminal:
            self._task = self._bar.add_task(text, total=None, amount="")
        else:
            self.console.print(f"{text} ...", markup=False)

    def weights(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bar.add_task("weights", total=total, amount="")
        amount = f"{_size(done)} of {_size(total)}"
        self._bar.update(self._task, completed=done, total=total, amount=amount)

    def _end_task(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


_CHATTING = ("lib-cpu.so", "lib-cuda.so", "lib-vulkan.so")  # mlc_llm builds for other devices too


_SAID = {"activations": "activations", "kv_cache_dtype": "KV cache"}


def _summary(result: BuildResult) -> list[str]:
    sizes = result.sizes
    lines = [
        f"built      {result.folder}",
        f"model      {result.parameters / 1e6:.1f} M parameters, {result.quantization}, "
        f"{result.bits_per_parameter:.2f} bits a parameter",
        f"weights    {_size(result.weight_bytes)}"
        + (f", layout {result.weight_layout}" if result.weight_layout else "")
        + (f", {_tables(result)}" if result.tables.names() else ""),
        f"library    {result.library}, {_size(result.library_bytes)}"
        + "".join(f", {_SAID[k]} {v}" for k, v in result.roundings.names().items())
        + "; context "
        f"{sizes.context_window_size}, prefill chunk {sizes.prefill_chunk_size}, "
        f"batch {sizes.max_batch_size}",
        f"template   {result.conv_template}"
        + (
            f" (differs from the model's own in {result.template_differences} test dialogues)"
            if result.template_differences
            else ""
        ),
    ]
    verification = result.verification
    if verification is None:
        lines.append(f"verified   no: {result.unverified}")
    else:
        layers = (
            f"layers {', '.join(map(str, verification.layers))}"
            if verification.layers
            else "all layers"
        )
        lines.append(
            f"verified   {layers} against PyTorch: relative error of the logits at most "
            f"{verification.worst:.1e} (limit {verification.limit:g})"
        )
        lines += _rounding(result)
    if result.via:
        lines.insert(1, f"through    {result.via}")
    if result.library in _CHATTING:
        lines.append(f"next       mlcawq chat {result.folder}")
    return lines


def _rounding(result: BuildResult) -> list[str]:
    """What head and embedding are stored as, and what that was seen to cost."""
    verification = result.verification
    loss = verification.rounding if verification is not None else None
    if loss is None:
        return []
    line = f"rounded    {_tables(result)}: the logits change by {loss.relative_error:.1e}"
    if loss.kl is not None:
        line += f", KL divergence {1000 * loss.kl:.2g} millinats a token over {loss.tokens}"
    return [line]


def _tables(result: BuildResult) -> str:
    return ", ".join(f"{key} {name}" for key, name in result.tables.names().items())


def _size(count: int) -> str:
    if count < 1e9:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.2f} GB"

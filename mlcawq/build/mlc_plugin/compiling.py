"""mlc_llm's compile step with our kernels in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from mlc_llm.support import logging
from tvm import IRModule, relax
from tvm.target import Target

from mlcawq.build.cuda_target import cuda_target_from_json
from mlcawq.build.link import Tools, find_tools
from mlcawq.build.mlc_plugin import kv_cache
from mlcawq.build.mlc_plugin.architecture import architecture
from mlcawq.build.mlc_plugin.experts import lower_awq_experts
from mlcawq.build.mlc_plugin.linear import AwqLinear
from mlcawq.build.mlc_plugin.lowering import lower_awq_linears
from mlcawq.build.mlc_plugin.quantization import interleaved
from mlcawq.build.mlc_plugin.routing import serial_threads
from mlcawq.build.targets import target_record
from mlcawq.errors import UserError
from mlcawq.graph.settings import check_layout
from tir_kernels import dispatch
from tir_kernels.layouts import AUTOAWQ

Run = Callable[..., None]

logger = logging.getLogger(__name__)

# Kinds of target whose libraries we link ourselves, and the device that runs each.
_DEVICES = {"llvm": "cpu", "cuda": "cuda", "webgpu": "vulkan", "vulkan": "vulkan"}
# mlc_llm's optimizations, and a function of TVM that they call while compiling or running.
_NEEDS = {
    "cublas_gemm": "relax.ext.cublas",
    "cutlass": "cutlass.group_gemm",
    "faster_transformer": "fastertransformer.gemm_fp16_int",
}

_MULTI_ARCH = "MLC_MULTI_ARCH"
_THRUST = "tvm.contrib.thrust.sort"


def install() -> None:
    """Let mlc_llm's compile step run as `compile_with_kernels`; called after it is imported."""
    from mlc_llm.cli import compile as cli

    kv_cache.install()
    detect = cli.detect_target_and_host
    cli.detect_target_and_host = lambda *words, **more: _detected(detect, words, more)
    run = cli.compile
    cli.compile = lambda **arguments: compile_with_kernels(run, **arguments)


def compile_with_kernels(run: Run, **arguments: Any) -> None:
    """mlc_llm's `interface.compile.compile`, which is `run`, on the same arguments.

    Raises UserError for what is known to fail before it starts: weights in a layout that the target
    has no kernels for, a compiler that is missing.
    """
    config, quantization = arguments["config"], arguments["quantization"]
    target = _own_target(arguments["target"])
    awq = quantization.kind == "awq"
    device = _DEVICES.get(target.kind.name)
    if awq:
        _check_layout(quantization.weight_layout, target)
        AwqLinear.has_kernel = staticmethod(_kernel_finder(target))
    links = device is not None and Path(arguments["output"]).suffix == ".so"
    tools = find_tools(target) if links else None
    if links:
        _check_architectures(target)
    model_config = _model_config(arguments["model_type"], config)
    computed = architecture(config, model_config)
    metadata: dict[str, Any] = {}

    def build(module: IRModule, args: Any, pipeline: Any) -> None:
        if awq:
            names = [param["name"] for param in metadata["params"]]
            module = lower_awq_linears(
                module, target, names, lambda name: interleaved(name, model_config)
            )
            module = lower_awq_experts(module, target)
        if target.kind.name == "llvm":
            module = serial_threads(module)
        if tools is None:
            arguments["build_func"](module, args, pipeline=pipeline)
        else:
            _link(tools, module, args, pipeline)

    make_pipeline = relax.pipeline.PIPELINE_MAP["mlc_llm"]

    def pipeline(**options: Any) -> Any:
        nonlocal metadata
        metadata = options["metadata"]
        if awq:
            _check_shards(metadata)
            metadata["weight_layout"] = quantization.weight_layout
        metadata["target"] = target_record(target)
        if computed is not None:
            metadata["architecture"] = computed
        return make_pipeline(**options)

    relax.pipeline.PIPELINE_MAP["mlc_llm"] = pipeline
    try:
        run(
            **{
                **arguments,
                "target": target,
                "opt": _available(arguments["opt"], target),
                "build_func": build,
            }
        )
    finally:
        relax.pipeline.PIPELINE_MAP["mlc_llm"] = make_pipeline


def _detected(detect: Callable[..., Any], words: tuple[Any, ...], more: dict[str, Any]) -> Any:
    try:
        return detect(*words, **more)
    except ValueError as error:
        raise UserError.one(
            f"{words[0]} cannot be compiled for: {error}",
            "--device",
            "give a TVM target in JSON where the device is not in this machine",
        ) from None


def _own_target(target: Target) -> Target:
    """As our kernels need it: for CUDA with the architecture's full name (sm_90a), and without
    libraries that this TVM was built without.
    """
    if target.kind.name != "cuda":
        return target
    given = {key: value for key, value in target.export().items() if key not in ("tag", "keys")}
    libs = [lib for lib in given.pop("libs", ()) if lib != "thrust" or _has(_THRUST)]
    if libs:
        given["libs"] = libs
    return cuda_target_from_json(given, str(given))


def _check_layout(layout: str, target: Target) -> None:
    check_layout(layout, _DEVICES.get(target.kind.name))
    if layout != AUTOAWQ:
        try:
            dispatch.kernels_for(target)
        except NotImplementedError as error:
            raise UserError.one(
                f"weights in the layout {layout} cannot be read: {error}",
                "weight_layout",
                f"convert them with --weight-layout {AUTOAWQ}",
            ) from None


def _check_architectures(target: Target) -> None:
    """mlc_llm's own variable asks for a library of code for several architectures at once."""
    asked = os.environ.get(_MULTI_ARCH)
    if asked and target.kind.name == "cuda":
        raise UserError.one(
            f"{asked} are asked for, but the kernels of a library are generated for one "
            f"architecture, here {target.attrs['arch']}",
            _MULTI_ARCH,
            "unset it, and build a library for each; or compile without the plug-in",
        )


def _check_shards(metadata: dict[str, Any]) -> None:
    shards = metadata["tensor_parallel_shards"]
    if shards != 1:
        raise UserError.one(
            f"AWQ models cannot be spread over {shards} devices: mlc_llm does not split their "
            "weights",
            "tensor_parallel_shards",
            "set it to 1",
        )


def _kernel_finder(target: Target) -> Callable[[AwqLinear], bool]:
    """Whether `target` has a kernel for a linear; says so once where it has not."""
    known: dict[Any, str] = {}

    def find(linear: AwqLinear) -> bool:
        if linear.config.weight_layout != AUTOAWQ:
            return True
        key = (linear.shape, linear.config.model_dtype)
        if key not in known:
            reason = _missing_kernel(target, linear)
            if reason and reason not in known.values():
                logger.warning("%s: mlc_llm's own dequantization is used", reason)
            known[key] = reason
        return not known[key]

    return find


def _missing_kernel(target: Target, linear: AwqLinear) -> str:
    shape, dtype = linear.shape, linear.config.model_dtype
    try:
        dispatch.w4a16_linear(target, shape.K, shape.N, shape.group_size, dtype, scale_dtype=dtype)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return ""


def _available(options: Any, target: Target) -> Any:
    """mlc_llm's optimization flags without those that this installation cannot do."""
    missing = [name for name, function in _NEEDS.items() if not _has(function)]
    if importlib.util.find_spec("flashinfer") is None:
        missing.append("flashinfer")
    off = [name for name in missing if getattr(options, name)]
    if off and target.kind.name == "cuda":
        logger.info("not available here, and left out: %s", ", ".join(off))
    return dataclasses.replace(options, **dict.fromkeys(off, False))


def _has(function: str) -> bool:
    return tvm.get_global_func(function, allow_missing=True) is not None


def _model_config(model_type: Any, config: dict[str, Any]) -> Any:
    """As mlc_llm reads it."""
    return model_type.config.from_dict({**config.get("model_config", {}), **config})


def _link(tools: Tools, module: IRModule, args: Any, pipeline: Any) -> None:
    with tools.generating():
        executable = relax.build(module, target=args.target, relax_pipeline=pipeline)
    tools.link(executable, args.output)

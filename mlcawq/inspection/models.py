"""What a build makes: model folders and compiled libraries, by mlcawq or by mlc_llm."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import load_json
from mlcawq.doctor.processes import run_python
from mlcawq.engine.artifact import check_library, read_folder
from mlcawq.engine.cores import default_threads
from mlcawq.engine.cpu_library import check_architecture, check_processor, read_record
from mlcawq.engine.shard_checks import check_shards
from mlcawq.errors import UserError
from mlcawq.inspection.description import Description, size

# Loading a library runs its initializers, and one built for another machine can crash: a process
# of its own does it, with TVM's runtime only. An empty module (of an object file: no bytes, no
# names) stands for GPU code whose device is not here, and a function for what the virtual machine
# wants of the device's runtime; neither is run.
_READ_METADATA = """
import json, os, sys
os.environ["TVM_USE_RUNTIME_LIB"] = "1"
import tvm, tvm_ffi
def nothing(code):
    return tvm_ffi.get_global_func("ffi.Module.load_from_bytes.static_library")(bytes(16))
for kind in ("cuda", "webgpu", "vulkan", "metal", "opencl", "rocm"):
    loader = "ffi.Module.load_from_bytes." + kind
    if tvm_ffi.get_global_func(loader, allow_missing=True) is None:
        tvm_ffi.register_global_func(loader, nothing)
for name in ("get_cached_alloc", "run_or_capture"):
    if tvm_ffi.get_global_func("vm.builtin.cuda_graph." + name, allow_missing=True) is None:
        tvm_ffi.register_global_func("vm.builtin.cuda_graph." + name, nothing)
try:
    module = tvm.runtime.load_module({path!r})
    vm = module["vm_load_executable"]()
    device = tvm.cpu()
    vm["vm_initialization"](device.dlpack_device_type(), device.index, 2)
    metadata = json.loads(str(vm["_metadata"]()))
    names = {names!r}
    # As engines look: a kernel alone (apply_penalty_inplace) is found among the imports.
    found = [n for n in names if vm.implements_function(n, query_imports=True)]
    print(json.dumps({{"metadata": metadata, "functions": found}}))
except Exception as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(json.dumps({{"error": lines[-1]}}))
"""
FUNCTIONS = (
    "embed",
    "prefill",
    "decode",
    "batch_prefill",
    "batch_decode",
    "batch_verify",
    "create_tir_paged_kv_cache",
    "alloc_embedding_tensor",
    "softmax_with_temperature",
    "sample_with_top_p",
    "multinomial_from_uniform",
    "argsort_probs",
    "sampler_take_probs",
    "sampler_verify_draft_tokens",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "apply_bitmask_inplace",
)
_SHOWN = (
    "model_type",
    "quantization",
    "weight_layout",
    "head",
    "embedding",
    "activations",
    "kv_cache_dtype",
    "target",
    "context_window_size",
    "prefill_chunk_size",
    "max_batch_size",
    "sliding_window_size",
    "tensor_parallel_shards",
    "kv_state_kind",
)


def read_library(path: Path) -> dict[str, Any]:
    """{"metadata": …, "functions": […]} of a compiled library. Raises UserError when it is none, or
    for another architecture.
    """
    check_architecture(path)
    code = _READ_METADATA.format(path=str(path.resolve()), names=list(FUNCTIONS))
    answer, error = run_python(code, timeout=120)
    error = error or str(answer.get("error", ""))
    if error:
        raise UserError.one(
            f"not a model library that the installed TVM can load: {error}",
            str(path),
            "compile it again with `mlcawq compile`",
        )
    return answer


def describe_library(path: Path) -> Description:
    """A shared library: its `_metadata` and the functions that engines look for."""
    out = Description(path, "a shared library", {"bytes": size(path.stat().st_size)})
    levels = _instruction_sets(out, path)
    if levels:
        out.facts["instruction sets"] = levels
    answer = out.attempt(lambda: read_library(path))
    if answer is None:
        return out
    out.kind = "a compiled model library"
    metadata = answer["metadata"]
    out.facts.update({key: metadata[key] for key in _SHOWN if metadata.get(key) is not None})
    if isinstance(metadata.get("target"), dict):
        out.facts["target"] = _target_text(metadata["target"])
    params = metadata.get("params") or []
    out.facts["parameters expected"] = f"{len(params)} tensors"
    memory = metadata.get("memory_usage") or {}
    if memory:
        largest = max(memory, key=lambda name: memory[name])
        out.facts["temporary memory"] = f"{size(int(memory[largest]))} at most ({largest})"
    out.facts["functions"] = answer["functions"]
    out.facts["metadata"] = {k: v for k, v in metadata.items() if k != "params"}
    return out


def _instruction_sets(out: Description, path: Path) -> str:
    """For which processors a library is, and what this one would run of it; empty where the file
    does not tell.
    """
    record = out.attempt(lambda: read_record(path))
    if record is None:
        return ""
    chosen = out.attempt(lambda: check_processor(path))
    here = f"; {chosen.name} on this machine" if chosen else ""
    return f"{record.architecture}: {record.names}{here}"


def _target_text(target: dict[str, Any]) -> str:
    """TVM's kind, and what narrows it down: the processor, the GPU's architecture."""
    narrower = target.get("arch") or target.get("mcpu")
    return f"{target.get('kind')} {narrower}" if narrower else str(target.get("kind"))


def describe_model_folder(path: Path) -> Description:
    """A folder with mlc-chat-config.json: config, weights, libraries, and whether they fit."""
    out = Description(path, "an MLC model folder")
    config = out.attempt(lambda: load_json(path / "mlc-chat-config.json"))
    if config is None:
        return out
    template = config.get("conv_template")
    out.facts.update({key: config[key] for key in _SHOWN if config.get(key) is not None})
    out.facts["vocabulary"] = config.get("vocab_size")
    out.facts["conversation template"] = (
        template.get("name") if isinstance(template, dict) else template
    )
    out.facts["tokenizer files"] = config.get("tokenizer_files")
    built = out.attempt(lambda: read_folder(path))
    _add_weights(out, path)
    if built is not None:
        out.problems += check_shards(built.shards, default_threads(), everything=True)
    libraries = built.libraries if built is not None else {}
    for kind, library in libraries.items():
        answer = out.attempt(lambda library=library: read_library(library))  # type: ignore[misc]
        name = f"library for {kind}"
        out.facts[name] = f"{library.name}, {size(library.stat().st_size)}"
        if answer is not None and built is not None:
            metadata = answer["metadata"]
            target = metadata.get("target")
            levels = _instruction_sets(out, library)
            if levels:
                out.facts[name] += f"; for {levels}"
            elif target:
                out.facts[name] += f"; for {_target_text(target)}"
            before = len(out.problems)
            out.attempt(lambda m=metadata, f=library: check_library(built, m, f))  # type: ignore[misc]
            out.facts[name] += "; fits" if len(out.problems) == before else "; does not fit"
    if not out.problems:
        out.next_step = f"mlcawq chat {path}"
    return out


def _add_weights(out: Description, path: Path) -> None:
    index = next(
        (path / n for n in ("tensor-cache.json", "ndarray-cache.json") if (path / n).is_file()),
        None,
    )
    if index is None:
        return
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = content["records"]
        records = [record for shard in shards for record in shard["records"]]
        total = sum(int(shard["nbytes"]) for shard in shards)
        kinds: Counter[str] = Counter()
        for record in records:
            part = record["name"].rpartition(".")[2]
            quantized = part in ("qweight", "qzeros", "scales")
            kinds[part if quantized else record["dtype"]] += int(record["nbytes"])
        out.facts["weights"] = f"{size(total)}, {len(records)} tensors in {len(shards)} shards"
        out.facts["bytes by kind"] = dict(kinds.most_common())
        bits = (content.get("metadata") or {}).get("BitsPerParam")
        if bits:
            out.facts["bits a parameter"] = round(float(bits), 3)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # read_folder has said what is wrong with it

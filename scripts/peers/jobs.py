"""What the peers' runners share. Imported in their environments: torch and safetensors only.

A runner is called with one job file, a JSON object:

    task        "quantize"
    method      what the peer is to do: see `methods` in runners.py
    model       folder of the checkpoint
    tokens      calibration, [windows, length]; the peer sees exactly these
    bits        2, 3 or 4
    group_size  channels that share a scale and a zero point
    out         folder to write: the checkpoint with its linears dequantized, in float16
    result      file to write: {"seconds": …, "cpu_seconds": …, "peak_rss_mib": …}, or
                {"cannot": REASON} and no `out`
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class CannotError(Exception):
    """The peer has no such method at that bit width or group size; the message says which."""


Job = dict[str, Any]
Quantizer = Callable[[Job], Mapping[str, torch.Tensor]]


def do_job(methods: Mapping[str, Quantizer]) -> None:
    """Do the job that the command line names.

    methods: for each "method" a function that gives the job's quantized model, dequantized, as
    tensors by their names in the checkpoint. Only that function is timed, which counts loading.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    for key in ("model", "out", "result"):
        job[key] = str(Path(job[key]).absolute())
    torch.manual_seed(0)
    result: dict[str, Any]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # peers write logs where they run
        try:
            start, cpu_before = time.perf_counter(), time.process_time()
            tensors = methods[job["method"]](job)
            result = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_before,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        except CannotError as error:
            result = {"cannot": str(error)}
        else:
            write_checkpoint(Path(job["model"]), Path(job["out"]), tensors)
    Path(job["result"]).write_text(json.dumps(result))


def write_checkpoint(folder: Path, out: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `folder` to `out` with the values of `tensors`, in float16.

    Names and files stay those of `folder`, whatever the peer makes of names and of tied weights.
    Raises KeyError where a tensor is missing, ValueError where one has another shape.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copyfile(file, out / file.name)
            continue
        written = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                tensor = tensors[name].detach()
                if list(tensor.shape) != stored.get_slice(name).get_shape():
                    raise ValueError(f"{name}: {list(tensor.shape)} is not its shape in {folder}")
                written[name] = tensor.to("cpu", torch.float16).clone().contiguous()
        save_file(written, out / file.name, metadata={"format": "pt"})

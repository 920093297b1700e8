"""Times on an NVIDIA GPU: what a kernel takes when its weights are not in the cache.

A measurement runs a kernel on several copies of its weights in turn, together far larger than the
second-level cache, captured as one CUDA graph: launches cost the GPU what they cost in a captured
decode, and the CPU nothing. Events around each replay, the median of the replays, divided by the
number of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import tvm_ffi

_CACHES = 3  # rotated buffers, in sizes of the second-level cache
_MOST_COPIES = 512
_REPLAYS = (10, 50)  # at least and at most
_SECONDS = 0.1  # for the replays of one measurement
_WARM_UP = 3

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Time:
    """seconds: of one run. captured: whether it ran from a CUDA graph; what cannot be captured is
    launched by the CPU, whose time is then in it.
    """

    seconds: float
    captured: bool = True


def copies_needed(nbytes: int) -> int:
    """Copies of a weight of nbytes that no cache holds together."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(_MOST_COPIES, -(-_CACHES * cache // nbytes)))


def measure(runs: Sequence[Run]) -> Time:
    """The time of one of `runs`, which do the same on different copies of the weights."""
    stream = torch.cuda.Stream()
    with tvm_ffi.use_torch_stream(torch.cuda.stream(stream)):
        for _ in range(_WARM_UP):
            for run in runs[: _WARM_UP + 1]:
                run()
        stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[torch.Tensor] = []
    try:
        with tvm_ffi.use_torch_stream(torch.cuda.graph(graph, stream=stream)):
            kept.extend(run() for run in runs)
    except RuntimeError:  # something in it waits for the GPU
        torch.cuda.synchronize()
        return Time(_median(lambda: [run() for run in runs], stream) / len(runs), captured=False)
    return Time(_median(graph.replay, stream) / len(runs))


def _median(action: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """Seconds that the GPU takes for one `action`."""
    times: list[float] = []
    with tvm_ffi.use_torch_stream(torch.cuda.stream(stream)):
        for _ in range(_WARM_UP):
            action()
        while len(times) < _REPLAYS[0] or (len(times) < _REPLAYS[1] and sum(times) < _SECONDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            action()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes a second of a large copy, read and written counted. multiply: float16
    operations a second of a large matrix product.
    """

    copy: float
    multiply: float


def ceilings() -> Ceilings:
    """Measured in this process, on random data."""
    return Ceilings(_copy_bandwidth(2**30), _multiply_rate(8192))


def _copy_bandwidth(nbytes: int) -> float:
    shape, bits = (nbytes // 4,), torch.iinfo(torch.int32)
    source = torch.randint(bits.min, bits.max, shape, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / measure([lambda: target.copy_(source)] * 2).seconds


def _multiply_rate(size: int) -> float:
    a, b = (torch.randn(size, size, device="cuda").half() for _ in range(2))
    return 2 * size**3 / measure([lambda: a @ b] * 2).seconds

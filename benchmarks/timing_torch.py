"""Times of CUDA graphs, and the ceilings of the device, as torch sees them.

torch is no dependency of this project, so it is imported where it is used.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

from timing import sampler, summary


def import_torch() -> Any:
    return importlib.import_module("torch")


class GraphReplay:
    """A function captured in a CUDA graph once; on a CPU it is called as it is.

    Attributes:
        results: what the function returned under capture; each replay writes it anew.
    """

    def __init__(self, function: Callable[[], Any], device: str = "cuda") -> None:
        self._torch = import_torch()
        self._function = function
        self._graph: Any = None
        if device == "cuda":
            self._capture()
        else:
            self.results = function()

    def _capture(self) -> None:
        cuda = self._torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(3):
                self._function()
        cuda.current_stream().wait_stream(stream)
        cuda.synchronize()
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            self.results = self._function()
        self._graph.replay()
        cuda.synchronize()

    def run(self, count: int) -> float:
        """See `timing.Run`; the time between two events on the device."""
        if self._graph is None:
            start = time.perf_counter()
            for _ in range(count):
                self._function()
            return time.perf_counter() - start
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def ceilings(num_bytes: int = 1 << 32, size: int = 8192, device: str = "cuda") -> dict[str, float]:
    """As `timing_jax.ceilings`."""
    torch = import_torch()
    with torch.no_grad():
        read, copy = _memory_seconds(num_bytes, device)
        matmul = _matmul_seconds(size, device)
    return {
        "read_TBps": num_bytes / read / 1e12,
        "copy_TBps": 2 * num_bytes / copy / 1e12,
        "bf16_matmul_TFLOPs": 2 * size**3 / matmul / 1e12,
    }


def _memory_seconds(num_bytes: int, device: str) -> tuple[float, float]:
    torch = import_torch()
    source = torch.empty(num_bytes // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    read = _median_seconds(source.sum, device)
    return read, _median_seconds(lambda: target.copy_(source), device)


def _matmul_seconds(size: int, device: str) -> float:
    torch = import_torch()
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return _median_seconds(lambda: a @ b, device)


def _median_seconds(function: Callable[[], Any], device: str) -> float:
    return summary(sampler(GraphReplay(function, device).run, 1)(15))["us"] / 1e6

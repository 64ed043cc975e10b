"""torch's side of `grouped_matmul.py`, in a process of its own (`peer_process`)."""

import math
from typing import Any

from peer_process import serve
from timing import Sampler, sampler
from timing_torch import GraphReplay, import_torch


class Server:
    """The requests of `grouped_matmul.py`, as methods."""

    def __init__(self) -> None:
        self._samplers: dict[str, Sampler] = {}

    def prepare(self, sizes: list[int], inputs: int, outputs: int, device: str) -> dict[str, Any]:
        """Warms up a shape.

        Args:
            sizes: rows of each expert.
            inputs: columns of the rows.
            outputs: columns of the result.
            device: `cuda` or `cpu`.

        Returns:
            `version` of torch and the names to sample, `passes`.
        """
        torch = import_torch()
        torch.set_grad_enabled(False)
        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
        rows = torch.randn(sum(sizes), inputs, **make)
        gradient = torch.randn(sum(sizes), outputs, **make)
        weight = torch.randn(len(sizes), outputs, inputs, **make).div_(math.sqrt(inputs))
        passes = {
            "forward": lambda: grouped_mm(rows, weight.transpose(1, 2), offs=ends),
            "rows_gradient": lambda: grouped_mm(gradient, weight, offs=ends),
            "weight_gradient": lambda: grouped_mm(gradient.t(), rows, offs=ends),
        }
        self._samplers = {
            name: sampler(GraphReplay(function, device).run, 1) for name, function in passes.items()
        }
        return {"version": torch.__version__, "passes": list(passes)}

    def sample(self, name: str, samples: int) -> list[float]:
        """Microseconds of one pass."""
        return self._samplers[name](samples)


if __name__ == "__main__":
    server = Server()
    serve({"prepare": server.prepare, "sample": server.sample})

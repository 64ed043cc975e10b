"""Contenders of `moe_layer.py` that run in torch, in a process of their own (`peer_process`).

`triton_kernels` is OpenAI's MXFP4 layer (package tokenspeed-triton-kernels): top-k, sort, two
matmuls with everything fused that it can fuse, and the sum over a token's experts. `grouped_mm` is
torch's grouped matmul on bfloat16 weights: the two matmuls alone.
"""

import contextlib
import importlib
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import moe_layer_problem as problem
import numpy as np
from moe_layer_problem import Packed, Shape
from peer_process import serve
from timing import Sampler, reason, sampler
from timing_torch import GraphReplay, ceilings, import_torch

_WARPS = (8, 4)
"""Each has its own layout of the weights, and its own tiles."""


class TritonKernels:
    """The layer of triton_kernels on weight sets in the layout for one number of warps."""

    def __init__(self, shape: Shape, sets: list[dict[str, Any]], combine: Callable) -> None:
        self._torch = import_torch()
        self._shape = shape
        self._sets = sets
        self._combine = combine
        self._matmul = importlib.import_module("triton_kernels.matmul")
        self._topk = importlib.import_module("triton_kernels.topk")
        self._tensor = importlib.import_module("triton_kernels.tensor")
        swiglu = importlib.import_module("triton_kernels.swiglu")
        specialize = importlib.import_module("triton_kernels.specialize")
        specs = specialize.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit"), reduction_n=2)
        self._activation = self._matmul.FusedActivation(specs, (1.702, 7.0))

    def replay(self, tokens: int, routing: str, device: str, stages: int | None) -> GraphReplay:
        """A chain of layers as ours; `stages` overrules the kernel's own choice."""
        sets = self._sets[: problem.sets_in_use(tokens, len(self._sets))]
        turns = range(len(sets) * problem.rotations(tokens))
        logits = [_bfloat16(problem.logits(self._shape, tokens, i, routing), device) for i in turns]
        rows = _bfloat16(problem.rows(self._shape, tokens), device)

        def layers() -> list[Any]:
            x, results = rows, []
            for i in turns:
                x = self._layer(x, logits[i], sets[i % len(sets)])
                results.append(x)
            return results

        forced: Any = contextlib.nullcontext()
        if stages is not None:
            forced = self._matmul.scoped_opt_flags_constraints({"num_stages": stages})
        with forced:
            return GraphReplay(layers, device)

    def _layer(self, x: Any, logits: Any, weights: dict[str, Any]) -> Any:
        k = self._shape.experts_per_token
        chosen = self._topk.topk(logits, k, apply_softmax=True)
        order = chosen.mask_metadata.col_sorted_indx
        ragged = self._tensor.make_ragged_tensor_metadata(
            chosen.mask_metadata.col_sum, order.shape[0]
        )
        gates = self._torch.index_select(chosen.vals.reshape(-1), 0, order)
        hidden = self._matmul.matmul(
            x,
            weights["gate_up"],
            weights["gate_up_bias"],
            a_ragged_metadata=ragged,
            gather_indx=self._torch.div(order, k, rounding_mode="floor"),
            precision_config=weights["gate_up_precision"],
            fused_activation=self._activation,
        )
        y = self._matmul.matmul(
            hidden,
            weights["down"],
            weights["down_bias"],
            a_ragged_metadata=ragged,
            scatter_indx=order,
            precision_config=weights["down_precision"],
            gammas=gates,
        )
        return self._combine(y.view(-1, k, y.shape[-1]))


def triton_kernels_weights(shape: Shape, sets: int, device: str) -> dict[int, list[dict[str, Any]]]:
    """The weight sets by number of warps; layouts differ in the scales alone."""
    found: dict[int, list[dict[str, Any]]] = {warps: [] for warps in _WARPS}
    torch = import_torch()
    for i in range(sets):
        raw = problem.weights(shape, i)
        shared = {
            "gate_up": _codes(raw.gate_up, device),
            "gate_up_bias": torch.from_numpy(raw.gate_up_bias).to(device),
            "down": _codes(raw.down, device),
            "down_bias": torch.from_numpy(raw.down_bias).to(device),
        }
        for warps, laid_out in found.items():
            precision = {
                "gate_up_precision": _scales(raw.gate_up, warps, device),
                "down_precision": _scales(raw.down, warps, device),
            }
            laid_out.append(shared | precision)
    return found


def _codes(packed: Packed, device: str) -> Any:
    """The codes as the kernel wants them."""
    tensor = importlib.import_module("triton_kernels.tensor")
    layout = importlib.import_module("triton_kernels.tensor_details.layout")
    codes = import_torch().from_numpy(packed.blocks).to(device).flatten(2)
    return tensor.convert_layout(
        tensor.wrap_torch_tensor(codes.transpose(1, 2), dtype=tensor.FP4),
        layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2),
    )


def _scales(packed: Packed, warps: int, device: str) -> Any:
    """The scales as the kernel wants them, in what says how to use them."""
    tensor = importlib.import_module("triton_kernels.tensor")
    layout = importlib.import_module("triton_kernels.tensor_details.layout")
    matmul = importlib.import_module("triton_kernels.matmul")
    scales = import_torch().from_numpy(packed.scales).to(device)
    laid_out = tensor.convert_layout(
        tensor.wrap_torch_tensor(scales.transpose(1, 2)),
        layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2, num_warps=warps),
    )
    return matmul.PrecisionConfig(b_mx_scale=laid_out, b_microblock_size=problem.BLOCK)


def supply_missing_names() -> None:
    """What triton_kernels imports and Triton before 3.7 does not have, in this process only."""
    info = importlib.import_module("triton.language.target_info")
    if not hasattr(info, "is_hip_gfx1250"):
        # another AMD chip stands in: the answer is no on every NVIDIA GPU
        info.is_hip_gfx1250 = info.is_hip_cdna4  # type: ignore
    jit = importlib.import_module("triton.runtime.jit")
    for name in ("def_file_line_number", "def_file_col_number"):
        if _triton_version() < (3, 7) and not hasattr(jit.JITFunction, name):
            setattr(jit.JITFunction, name, 1)


def _triton_version() -> tuple[int, ...]:
    found = importlib.import_module("triton").__version__
    return tuple(int(part) for part in found.split(".")[:2])


def combine_function() -> tuple[Callable, str]:
    """What sums a token's rows, and its name: the package's kernel needs Triton 3.7 or newer."""
    if _triton_version() < (3, 7):
        return (lambda y: y.sum(1)), "torch.sum"
    reduce = importlib.import_module("triton_kernels.reduce").reduce

    def combine(y: Any) -> Any:
        result = reduce(y, dim=1)
        return result[0] if isinstance(result, tuple) else result

    return combine, "triton_kernels.reduce"


class GroupedMM:
    """torch's grouped matmul on bfloat16 weights: the two matmuls alone."""

    def __init__(self, shape: Shape, device: str, sets: int = 2) -> None:
        self._torch = import_torch()
        self._shape = shape
        self._device = device
        functional = self._torch.nn.functional
        self._grouped_mm = getattr(functional, "grouped_mm", None) or self._torch._grouped_mm
        self._weights = [
            (self._weight(*shape.gate_up), self._weight(*shape.down)) for _ in range(sets)
        ]

    def _weight(self, outputs: int, inputs: int) -> Any:
        """[expert, in, out] with `in` contiguous, the layout that it is fastest with."""
        size = (self._shape.num_experts, outputs, inputs)
        normal = self._torch.randn(*size, device=self._device, dtype=self._torch.bfloat16)
        return normal.div_(math.sqrt(inputs)).transpose(1, 2)

    def replay(self, tokens: int, routing: str) -> GraphReplay:
        shape, torch = self._shape, self._torch
        offsets = []
        for i in range(len(self._weights)):
            logits = problem.logits(shape, tokens, i, routing)
            ids, _ = problem.route(logits, shape.experts_per_token)
            sizes = np.bincount(ids.reshape(-1), minlength=shape.num_experts)
            offsets.append(torch.from_numpy(sizes.cumsum().astype(np.int32)).to(self._device))
        count = tokens * shape.experts_per_token
        first, second = (
            torch.randn(count, width, device=self._device).bfloat16()
            for width in (shape.hidden_size, shape.intermediate_size)
        )

        def matmuls() -> list[Any]:
            return [
                (self._grouped_mm(first, a, offs=ends), self._grouped_mm(second, b, offs=ends))
                for (a, b), ends in zip(self._weights, offsets, strict=True)
            ]

        return GraphReplay(matmuls, self._device)


def _bfloat16(array: np.ndarray, device: str) -> Any:
    return import_torch().from_numpy(array).to(device).bfloat16()


class Server:
    """The requests of `moe_layer.py`, as methods."""

    def __init__(self) -> None:
        self._device = "cuda"
        self._shape = Shape()
        self._sets = 0
        self._absent: dict[str, str] = {}
        self._layers: dict[int, TritonKernels] = {}
        self._grouped_mm: GroupedMM | None = None
        self._replays: dict[str, GraphReplay] = {}
        self._samplers: dict[str, Sampler] = {}

    def start(self, shape: dict, sets: int, device: str, contenders: list[str]) -> dict:
        """Makes the weights.

        Returns:
            `versions`, and `absent`: the reason by name for contenders that cannot run.
        """
        torch = import_torch()
        torch.set_grad_enabled(False)
        self._device, self._shape, self._sets = device, Shape(**shape), sets
        versions = {"torch": torch.__version__}
        if device == "cuda" and not torch.cuda.is_available():
            return {"versions": versions, "absent": dict.fromkeys(contenders, "torch sees no GPU")}
        starters = {"triton_kernels": self._start_triton_kernels, "grouped_mm": self._start_grouped}
        with contextlib.suppress(ImportError):
            versions["triton"] = importlib.import_module("triton").__version__
        for name in contenders:
            try:
                versions |= starters[name](sets)
            except Exception as error:
                self._absent[name] = reason(error)
        return {"versions": versions, "absent": self._absent}

    def _start_triton_kernels(self, sets: int) -> dict[str, str]:
        supply_missing_names()
        combine, name = combine_function()
        weights = triton_kernels_weights(self._shape, sets, self._device)
        self._layers = {
            warps: TritonKernels(self._shape, laid_out, combine)
            for warps, laid_out in weights.items()
        }
        versions = {"triton_kernels combine": name}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package = "tokenspeed-triton-kernels"
            versions[package] = importlib.metadata.version(package)
        return versions

    def _start_grouped(self, sets: int) -> dict[str, str]:
        self._grouped_mm = GroupedMM(self._shape, self._device)
        return {}

    def prepare(self, tokens: int, routing: str) -> dict:
        """Captures every variant for a number of tokens, and forgets those before.

        Returns:
            `variants`: {name: {contender, per_call}}, and `absent`: reasons by name.
        """
        self._replays, self._samplers, absent = {}, {}, {}
        layers = problem.sets_in_use(tokens, self._sets) * problem.rotations(tokens)
        variants: dict[str, dict] = {}
        for name, contender, per_call, make in self._variants(tokens, routing, layers):
            try:
                self._replays[name] = make()
                variants[name] = {"contender": contender, "per_call": per_call}
            except Exception as error:
                absent[name] = reason(error)
        return {"variants": variants, "absent": absent}

    def _variants(self, tokens: int, routing: str, layers: int) -> list[tuple]:
        found: list[tuple] = []
        for warps, layer in self._layers.items():
            for stages in (None,) if tokens < 2048 else (None, 3):
                suffix = f" {warps} warps" + ("" if stages is None else f" {stages} stages")

                def make(layer: TritonKernels = layer, stages: int | None = stages) -> GraphReplay:
                    return layer.replay(tokens, routing, self._device, stages)

                found.append((f"triton_kernels{suffix}", "triton_kernels", layers, make))
        if self._grouped_mm is not None:
            grouped = self._grouped_mm
            found.append(("grouped_mm", "grouped_mm", 2, lambda: grouped.replay(tokens, routing)))
        return found

    def warm(self, name: str, per_call: int, sample: float) -> None:
        """Warms a variant up."""
        self._samplers[name] = sampler(self._replays[name].run, per_call, sample=sample)

    def sample(self, name: str, samples: int) -> list[float]:
        """Microseconds of one layer."""
        return self._samplers[name](samples)

    def output(self, name: str, path: str) -> None:
        """Writes the rows after the first layer, float32 [tokens, hidden_size]."""
        replay = self._replays[name]
        first = replay.results[0]
        if self._device == "cuda":
            first.fill_(math.nan)
            replay.run(1)
        np.save(path, first.float().cpu().numpy())


if __name__ == "__main__":
    server = Server()
    serve(
        {
            "start": server.start,
            "ceilings": ceilings,
            "prepare": server.prepare,
            "warm": server.warm,
            "sample": server.sample,
            "output": server.output,
        }
    )

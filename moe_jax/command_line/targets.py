"""Files to write, and what runs them afterwards."""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.command_line.options import WRITE, ReadOptions, UsageError, WriteOptions, check_applies
from moe_jax.command_line.sources import (
    ATTRIBUTES_SUFFIX,
    microsoft_target,
    open_source,
    read_infmoe,
)
from moe_jax.command_line.states import STATE_FORMATS, States
from moe_jax.layer import MoE
from moe_jax.mixture_of_experts import fused_experts
from moe_jax.quantization.packed import is_packed
from moe_jax.tagged import Tagged, is_tagged
from moe_jax.variables import Variables

type Layers = Mapping[str, Any]
"""Layers by name: `MoE`, or experts without a router."""
type Inputs = Mapping[str, tuple[np.ndarray, ...]]
"""By layer: tokens float32 [b, s, d]; for experts without a router ids and scores [b, s, k] too."""
type Run = tuple[dict[str, np.ndarray], str]
"""Outputs [b, s, d] by layer, and what computed them."""

ORT_EXACT = "ORT_QMOE_CPU_QNBIT_GEMM"
"""With `fp32` onnxruntime's CPU does not round what 8-bit weights are multiplied with to 8 bits."""

_NO_ONNXRUNTIME = "moe_jax, read back (onnxruntime is not installed)"
_NOT_ON_CPU = "moe_jax, read back (reference only: no CPU runs it)"


@dataclasses.dataclass(frozen=True)
class Target:
    """How a format is written and run.

    Attributes:
        write: (path, layers, options) -> None.
        run: (path, layers as written, inputs, options) -> outputs and what computed them.
        with_router: whether it holds layers with routers only.
        single: whether a file holds one layer only.
        packed: whether it holds packed weights.
    """

    write: Callable[[Path, Layers, WriteOptions], None]
    run: Callable[[Path, Layers, Inputs, WriteOptions], Run]
    with_router: bool = True
    single: bool = False
    packed: bool = False


def target_of(name: str, layers: Layers, options: WriteOptions) -> Target:
    """The target of a format. Raises UsageError where it cannot hold so many, or such, layers."""
    check_applies(options, WRITE, name)
    target = _TARGETS[name]
    if target.single and len(layers) > 1:
        raise UsageError(
            f"{name} holds one layer a file, the source has {', '.join(layers)}: choose with "
            f"--layer"
        )
    for layer, one in layers.items():
        if target.with_router and not isinstance(one, MoE):
            raise UsageError(f"layer {layer!r} has no router, and {name} holds layers with one")
        if not target.packed and any(map(is_packed, _weights(one))):
            raise UsageError(
                f"layer {layer!r} has packed weights, for which {name} has no place: --dequantize "
                f"float32 decodes them"
            )
    return target


def run_layer(layer: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """What moe_jax makes of inputs, float32."""
    if isinstance(layer, MoE):
        return np.asarray(_compiled()(layer, jnp.asarray(inputs[0])))
    x, ids, scores = map(jnp.asarray, inputs)
    return np.asarray(fused_experts(x, ids.astype(jnp.int32), scores, layer))


def dequantized(layer: Any, dtype: str) -> Any:
    """The layer with packed weights decoded to floats; floats that `dtype` holds become it too."""
    if not isinstance(layer, MoE) or not isinstance(layer.experts, Variables):
        return layer

    def one(weight: Any) -> Any:
        if is_packed(weight):
            return weight.dequantize(jnp.dtype(dtype))
        wider = weight.dtype.itemsize < jnp.dtype(dtype).itemsize
        return weight.astype(jnp.dtype(dtype)) if wider else weight

    experts = jax.tree.map(
        one,
        layer.experts.tree(),
        is_leaf=lambda n: is_packed(n) or is_tagged(n),
    )
    graph, state = nnx.split(layer)
    copy = nnx.merge(graph, state)
    copy.experts = Variables(experts)
    return copy


def _weights(layer: Any) -> list[Any]:
    """The arrays and packed weights of a layer's experts."""
    experts = layer.experts if isinstance(layer, MoE) else layer
    tree = experts.tree() if isinstance(experts, Variables) else experts
    return jax.tree.leaves(tree, is_leaf=lambda n: is_packed(n) or is_tagged(n))


@functools.cache
def _compiled() -> Callable[[MoE, jax.Array], jax.Array]:
    return nnx.jit(lambda layer, x: layer(x))


def _widened(layers: Layers, options: WriteOptions) -> str | None:
    """The dtype to write: bfloat16 as float32, which holds the same numbers, where none is said."""
    if options.dtype is not None:
        return options.dtype
    leaves = [leaf for one in layers.values() for leaf in _weights(one)]
    wide = any(isinstance(n, Tagged) and n.dtype == jnp.bfloat16 for n in leaves)
    return "float32" if wide else None


def _external(path: Path, options: WriteOptions) -> str | None:
    return f"{path.name}.data" if options.external_data else None


def _write_custom(path: Path, layers: Layers, options: WriteOptions) -> None:
    from moe_jax.formats.onnx import custom

    custom.write(
        path,
        layers,
        expert_dtype=_widened(layers, options),
        functions=[custom.custom_moe_function()] if options.definition else [],
        external_data=_external(path, options),
    )


def _write_dense(path: Path, layers: Layers, options: WriteOptions) -> None:
    from moe_jax.formats.onnx import dense

    dense.write(
        path, layers, dtype=options.dtype or "float32", external_data=_external(path, options)
    )


def _write_microsoft(path: Path, layers: Layers, options: WriteOptions) -> None:
    from moe_jax.formats.onnx import microsoft

    microsoft.write(
        path,
        layers,
        target=microsoft_target(options.target),
        float_type=_widened(layers, options),
        external_data=_external(path, options),
    )


def _write_openvino(path: Path, layers: Layers, options: WriteOptions) -> None:
    from moe_jax.formats import openvino

    openvino.write(path, layers)


def _write_infmoe(path: Path, layers: Layers, options: WriteOptions) -> None:
    from moe_jax.formats import infmoe
    from moe_jax.formats.infmoe.attributes_file import write_attributes

    (layer,) = layers.values()
    plugin = infmoe.write_layer(layer, path)
    write_attributes(plugin, path.with_suffix(ATTRIBUTES_SUFFIX))


def _write_state(format: str, path: Path, layers: Layers, options: WriteOptions) -> None:
    from safetensors.numpy import save_file

    kind = STATE_FORMATS[format]
    tensors: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        prefix = "" if len(layers) == 1 and name == "moe" else f"{name}."
        tensors.update(kind.write(layer, prefix))
    save_file(tensors, path)


def _run_onnx(path: Path, layers: Layers, inputs: Inputs, options: WriteOptions) -> Run:
    """By onnxruntime, with the definition of CustomMoE where the file has no other."""
    if importlib.util.find_spec("onnxruntime") is None:
        return _run_read(path, layers, inputs, options, _NO_ONNXRUNTIME)
    if options.target == "cuda":
        return _run_read(path, layers, inputs, options, _NOT_ON_CPU)
    import onnxruntime

    session = _session(path)
    floats = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds = {}
    for entry in session.get_inputs():
        x = inputs[entry.name.removesuffix(".x")][0].astype(floats[entry.type])
        feeds[entry.name] = x if len(entry.shape) == 3 else x.reshape(-1, x.shape[-1])
    names = [entry.name for entry in session.get_outputs()]
    found = {}
    for name, y in zip(names, session.run(names, feeds), strict=True):
        layer = name.removesuffix(".y")
        found[layer] = np.asarray(y, np.float32).reshape(inputs[layer][0].shape)
    return found, f"onnxruntime {onnxruntime.__version__}"


def _session(path: Path) -> Any:
    """A session on the CPU; weights of 8 bits are multiplied in float32."""
    import onnx
    import onnxruntime

    from moe_jax.formats.onnx import custom

    source: Any = os.fspath(path)
    model = onnx.load_model(source, load_external_data=False)
    if any(o.domain == custom.DOMAIN for o in model.opset_import) and not model.functions:
        model = onnx.load_model(source)
        model.functions.append(custom.custom_moe_function())
        source = model.SerializeToString()
    before = os.environ.get(ORT_EXACT)
    os.environ[ORT_EXACT] = "fp32"
    try:
        return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    finally:
        if before is None:
            del os.environ[ORT_EXACT]
        else:
            os.environ[ORT_EXACT] = before


def _run_read(path: Path, layers: Layers, inputs: Inputs, options: WriteOptions, what: str) -> Run:
    """By moe_jax, of what is read back from an ONNX file."""
    source = open_source(path, ReadOptions(target=options.target))
    return {name: run_layer(source.read(name), inputs[name]) for name in layers}, what


def _run_openvino(path: Path, layers: Layers, inputs: Inputs, options: WriteOptions) -> Run:
    """By OpenVINO, in float32."""
    from moe_jax.formats.openvino.model import run_model
    from moe_jax.formats.openvino.package import load_openvino

    ov = load_openvino()
    parts = ("hidden_states", "selected_experts", "scores")
    feeds = {
        f"{name}.{part}": array
        for name, arrays in inputs.items()
        for part, array in zip(parts, arrays, strict=False)
    }
    outputs = run_model(ov.Core().read_model(os.fspath(path)), feeds)
    found = {name.removesuffix(".output"): array for name, array in outputs.items()}
    return found, f"openvino {ov.__version__.partition('-')[0]}"


def _run_infmoe(path: Path, layers: Layers, inputs: Inputs, options: WriteOptions) -> Run:
    ((name, layer),) = layers.items()
    norm = layer.experts.tree().norm.kind
    back = read_infmoe(path, ReadOptions(norm=norm))
    return {name: run_layer(back, inputs[name])}, "moe_jax, read back"


def _run_state(
    format: str, path: Path, layers: Layers, inputs: Inputs, options: WriteOptions
) -> Run:
    found = {}
    for name, layer in layers.items():
        count = layer.config.experts_per_token
        back = States.open(path, ReadOptions(format, experts_per_token=count))
        found[name] = run_layer(back.read(name), inputs[name])
    return found, "moe_jax, read back"


_TARGETS: Mapping[str, Target] = {
    "onnx-custom": Target(_write_custom, _run_onnx),
    "onnx-dense": Target(_write_dense, _run_onnx),
    "onnx-microsoft": Target(_write_microsoft, _run_onnx, packed=True),
    "openvino": Target(_write_openvino, _run_openvino, with_router=False),
    "infmoe": Target(_write_infmoe, _run_infmoe, single=True),
    **{
        name: Target(
            functools.partial(_write_state, name),
            functools.partial(_run_state, name),
            packed=name == "torch:gpt-oss-mxfp4",
        )
        for name in STATE_FORMATS
    },
}

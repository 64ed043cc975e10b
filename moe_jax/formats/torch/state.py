"""Layers of state dicts, and back."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moe_jax.activations import Activation
from moe_jax.experts.layers import GatedMLP
from moe_jax.formats.arrays import FLOATS, OUT_IN, numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import Layers, as_layers, check_sayable, experts_of
from moe_jax.formats.torch.layouts import Layout, Tensor
from moe_jax.formats.torch.tensors import (
    check_names,
    load_tensors,
    named_below,
    tensor_names,
    to_numpy,
)
from moe_jax.layer import MoE
from moe_jax.tagged import Tagged, tag
from moe_jax.variables import value


def read(path: str | os.PathLike[str], layout: Layout, *, experts_per_token: int) -> dict[str, MoE]:
    """The layers in a safetensors file or folder, by the paths at which they lie.

    A layer lies wherever there is a router of the layout's name; one that lies at the top, without
    a path, is named `moe`.

    Raises:
        CheckpointError: a file is missing or damaged.
        FormatError: there is no layer, or one is not of the layout; see `import_state`.
        ValueError: `experts_per_token` is not between 1 and the number of experts.
    """
    names = tensor_names(path)
    router = _router_name(layout)
    prefixes = [n.removesuffix(router) for n in names if f".{n}".endswith(f".{router}")]
    if not prefixes:
        raise FormatError(f"{os.fspath(path)} has no tensor {router}, the router of the layout")
    return {
        prefix.removesuffix(".") or "moe": import_state(
            load_tensors(path, prefix), layout, experts_per_token=experts_per_token, prefix=prefix
        )
        for prefix in sorted(prefixes)
    }


def write(path: str | os.PathLike[str], layers: Layers, layout: Layout) -> None:
    """Writes layers to a safetensors file, each at the path that is its name.

    Args:
        path: of the file, which is replaced. Nothing is written where a layer is refused.
        layers: one layer, which lies at the top, several by name, or a Flax model, of which the
            `MoE` inside are taken.
        layout: of them all.

    Raises:
        FormatError: a layer is not of the layout's kind; the message names its field.
        TypeError: `layers` holds something else than `MoE`.
    """
    state: dict[str, np.ndarray] = {}
    for name, layer in as_layers(layers).items():
        prefix = "" if isinstance(layers, MoE) else f"{name}."
        state |= export_state(layer, layout, prefix=prefix)
    save_file(state, path)


def import_state(
    state: Mapping[str, Any], layout: Layout, *, experts_per_token: int, prefix: str = ""
) -> MoE:
    """The layer that a state dict holds.

    Args:
        state: tensors by name; names that do not begin with `prefix` are not looked at.
        layout: which tensor holds what.
        experts_per_token: how many experts a token is sent to.
        prefix: of the layer's names, such as `model.layers.0.block_sparse_moe.`.

    Raises:
        FormatError: names are missing or not known, or shapes or dtypes do not fit.
        ValueError: `experts_per_token` is not between 1 and the number of experts.
    """
    own = named_below(state, prefix)
    num_experts = _num_experts(own, layout, prefix)
    expected = [name for part in layout.tensors for name in _names(part, num_experts)]
    check_names(own, expected, prefix)
    fields: dict[str, Tagged] = {}
    for part in layout.tensors:
        fields.update(_read(own, part, num_experts))
    _check_sizes(layout, fields)
    router_weight, router_bias = fields.pop("router_weight"), fields.pop("router_bias", None)
    return MoE(
        layout.experts(**fields, activation=layout.activation),
        router_weight,
        router_bias,
        experts_per_token=experts_per_token,
        router=layout.router,
    )


def export_state(layer: MoE, layout: Layout, *, prefix: str = "") -> dict[str, np.ndarray]:
    """A layer's state dict, of NumPy arrays; bfloat16 is that of ml_dtypes.

    Raises:
        FormatError: the layer is not of the layout's kind; the message names its field.
    """
    experts = _checked_experts(layer, layout)
    num_experts = value(layer.router_weight).size("expert")
    state: dict[str, np.ndarray] = {}
    for part in layout.tensors:
        axes = ("expert", *part.axes) if part.per_expert else part.axes
        arrays = [numpy_of(field, _field(layer, experts, field), axes) for field in part.fields]
        array = np.concatenate(arrays, axes.index("out")) if len(arrays) > 1 else arrays[0]
        names = _names(part, num_experts)
        # each tensor in memory of its own, in order
        pieces: Iterable[np.ndarray] = array if part.per_expert else [array]
        state.update({prefix + n: np.array(a) for n, a in zip(names, pieces, strict=True)})
    return state


def _names(part: Tensor, num_experts: int) -> list[str]:
    """The names of a part's tensors."""
    if not part.per_expert:
        return [part.name]
    return [part.name.format(expert) for expert in range(num_experts)]


def _router_name(layout: Layout) -> str:
    return next(part.name for part in layout.tensors if part.fields == ("router_weight",))


def _num_experts(state: Mapping[str, Any], layout: Layout, prefix: str) -> int:
    """How many experts the router has."""
    name = _router_name(layout)
    if name not in state:
        raise FormatError(f"there is no tensor {prefix}{name}, the router")
    shape = tuple(state[name].shape)
    if len(shape) != 2:
        raise FormatError(f"{prefix}{name} must be [experts, hidden_size], got {shape}")
    return shape[0]


def _read(state: Mapping[str, Any], part: Tensor, num_experts: int) -> dict[str, Tagged]:
    """The fields of one part, weights as {expert, out, in}."""
    arrays = [to_numpy(state[name]) for name in _names(part, num_experts)]
    kinds = {(array.shape, array.dtype) for array in arrays}
    if len(kinds) > 1:
        raise FormatError(f"{part.name} must be alike for all experts, got {kinds}")
    array, axes = arrays[0], part.axes
    if part.per_expert:
        array, axes = np.stack(arrays), ("expert", *axes)
    if str(array.dtype) not in FLOATS:
        raise FormatError(f"{part.name} must be floats, got {array.dtype}")
    if array.ndim != len(axes):
        raise FormatError(f"{part.name} must have the axes {axes}, got the shape {array.shape}")
    if "in" in axes:
        array, axes = array.transpose([axes.index(a) for a in OUT_IN]), OUT_IN
    pieces = [array]
    if len(part.fields) > 1:
        place = axes.index("out")
        if array.shape[place] % len(part.fields):
            raise FormatError(
                f"{part.name} holds {len(part.fields)} matrices, {array.shape[place]} is no "
                f"multiple of it"
            )
        pieces = np.split(array, len(part.fields), place)
    return {field: tag(piece, *axes) for field, piece in zip(part.fields, pieces, strict=True)}


def _check_sizes(layout: Layout, fields: Mapping[str, Tagged]) -> None:
    """Raises FormatError unless matrices and biases fit each other."""
    router = fields["router_weight"]
    experts, hidden = router.size("expert"), router.size("d")
    lanes = 2 if layout.activation.gated and layout.experts is not GatedMLP else 1
    inner = fields["down"].size("in")
    for field, tagged in fields.items():
        if field == "router_weight":
            continue
        outputs = hidden if field.startswith("down") else lanes * inner
        inputs = inner if field == "down" else hidden
        expected = {"expert": experts, "out": outputs, "in": inputs}
        expected = {axis: expected[axis] for axis in tagged.axes}
        if tagged.sizes != expected:
            raise FormatError(
                f"{field} must have {expected}, got {tagged}: is the layout the right one?"
            )


def _checked_experts(layer: MoE, layout: Layout) -> Any:
    """The layer's experts, after a check that the layout can hold the layer."""
    check_sayable(layer, "router", "router_bias")
    experts, config = experts_of(layer), layer.config
    if type(experts) is not layout.experts:
        raise FormatError(
            f"the experts are {type(experts).__name__}, the layout holds {layout.experts.__name__}"
        )
    names = {field for part in layout.tensors for field in part.fields}
    for field in ("activation", "router"):
        found = experts.activation if field == "activation" else config.router
        expected = getattr(layout, field)
        if not _same(layout.experts, found, expected):
            raise FormatError(
                f"{field} is {found}, the layout's is {expected}: state dicts do not hold it, so "
                f"use dataclasses.replace(layout, {field}=...) on both sides"
            )
    present = {"router_bias": layer.router_bias} if layer.router_bias is not None else {}
    present |= {field: part for field, part in vars(experts).items() if field != "activation"}
    extra = [field for field, part in present.items() if part is not None and field not in names]
    lacking = [field for field in names - {"router_weight"} if present.get(field) is None]
    if extra or lacking:
        raise FormatError(
            f"the layout has no tensors for {sorted(extra)}, and needs {sorted(lacking)}"
        )
    return experts


def _same(experts: type, found: Any, expected: Any) -> bool:
    if experts is GatedMLP and isinstance(found, Activation):
        found = dataclasses.replace(found, layout=expected.layout)  # it is not used there
    return found == expected


def _field(layer: MoE, experts: Any, field: str) -> Any:
    return value(getattr(layer, field)) if field.startswith("router") else getattr(experts, field)

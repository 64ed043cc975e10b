"""The MoE layers of a Flax model, by the path at which each lies."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from moe_jax.formats.errors import FormatError
from moe_jax.layer import MoE
from moe_jax.routing import Router
from moe_jax.tagged import Tagged, is_tagged
from moe_jax.variables import Variables, value

_EXECUTION = ("algorithm", "tokens_per_expert_ratio", "overflow", "sharding")
"""Fields of a layer's config that say how it is computed, not what."""


CHOSEN_SOFTMAX_ROUTERS = (
    Router(),
    Router(renormalize=True),
    Router(order="before_top_k", renormalize=True),
)
"""The routers that weigh by a softmax over the chosen logits; they differ in rounding only."""


def moe_layers(model: nnx.Module) -> dict[str, MoE]:
    """The `MoE` modules inside `model` by path, such as `blocks.1.mlp`.

    A module that lies at several paths stands under the first. A model that is itself a layer has
    the path `moe`.

    Raises:
        FormatError: there is none.
    """
    layers = {
        ".".join(map(str, path)) or "moe": module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MoE)
    }
    if not layers:
        raise FormatError(f"{type(model).__name__} holds no moe_jax.MoE")
    return dict(sorted(layers.items()))


type Layers = MoE | Mapping[str, MoE] | nnx.Module
"""What can be written: a layer, several by name, or a model, whose `MoE` inside are taken."""


def as_layers(layers: Layers) -> Mapping[str, MoE]:
    """Layers by name; a single one is named `moe`, those of a model by their paths.

    Raises:
        TypeError: something is not an `MoE`.
        FormatError: there is none, or one has an empty name.
    """
    named = moe_layers(layers) if isinstance(layers, nnx.Module) else layers
    if not isinstance(named, Mapping):
        raise TypeError(f"expected layers by name, got {type(layers).__name__}")
    for name, layer in named.items():
        if not isinstance(layer, MoE):
            raise TypeError(
                f"expected moe_jax.MoE layers by name, got {type(layer).__name__} for {name!r}; "
                f"moe_layers(model) finds those of a model"
            )
    check_layer_names(named)
    return named


def check_layer_names(layers: Mapping[str, Any]) -> None:
    """Raises FormatError where there are no layers, or one has an empty name."""
    if not layers:
        raise FormatError("expected at least one layer, got none")
    if not all(layers):
        raise FormatError("each of several layers needs a name")


def load_layers(model: nnx.Module, layers: Mapping[str, MoE]) -> None:
    """Puts the values of `layers` into the layers of `model` that have the same paths.

    What a layer computes must agree: its router, the kind of its experts, the sizes and dtypes of
    its arrays. Which algorithm dispatches, and over which devices, stays the model's own.

    Raises:
        FormatError: paths differ, or a layer is of another kind; the model is then unchanged.
    """
    own = moe_layers(model)
    if set(own) != set(layers):
        raise FormatError(
            f"the model has MoE layers at {sorted(own)}, got layers for {sorted(layers)}"
        )
    changes = [_changes(name, layer, layers[name]) for name, layer in own.items()]
    for variable, array in (change for layer in changes for change in layer):
        variable.set_value(array)


def experts_of(layer: MoE) -> Any:
    """The experts of a layer as the pytree it was made of.

    Raises:
        FormatError: they are a Flax module, whose computation no format can say.
    """
    if not isinstance(layer.experts, Variables):
        raise FormatError(
            f"the experts are the Flax module {type(layer.experts).__name__}: only experts of "
            f"moe_jax, such as MLP and GatedMLP, can be written"
        )
    return layer.experts.tree()


def check_sayable(layer: MoE, *parts: str) -> None:
    """Raises FormatError where a layer does something that a format has no place for.

    Args:
        layer: the layer.
        parts: the fields of the layer and of its config that the format can say, besides
            `experts`, `router_weight` and `experts_per_token`. Which algorithm computes all chosen
            pairs, and on which devices, is not part of what a layer says.
    """
    config = layer.config
    if config.tokens_per_expert_ratio is not None or config.algorithm == "fixed_budget":
        raise FormatError(
            f"tokens_per_expert_ratio={config.tokens_per_expert_ratio} with "
            f"algorithm={config.algorithm!r}: only a layer that computes every chosen pair can be "
            f"written, make one without a ratio"
        )
    said = {"experts", "router_weight", "experts_per_token", *_EXECUTION, *parts}
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        if field.name not in said and given != field.default:
            raise FormatError(f"{field.name}={given!r}: this format only says {field.default!r}")
    for name in nnx.state(layer):
        if name not in said:
            raise FormatError(f"{name}: this format has no place for it, make the layer without")


def _changes(name: str, own: MoE, other: MoE) -> list[tuple[nnx.Variable, jax.Array]]:
    """The variables of `own`, each with the array that it is to hold."""
    for field in (f.name for f in dataclasses.fields(own.config) if f.name not in _EXECUTION):
        expected, found = getattr(own.config, field), getattr(other.config, field)
        if expected != found:
            raise FormatError(f"layer {name!r}: {field} is {expected} in the model, not {found}")
    structures = [jax.tree.structure(experts_of(n), is_leaf=is_tagged) for n in (own, other)]
    if structures[0] != structures[1]:
        raise FormatError(
            f"layer {name!r}: the experts are {structures[0]} in the model, not {structures[1]}"
        )
    parts, others = _parts(own), _parts(other)
    described, found = (
        {key: _kind(tagged) for key, (_, tagged) in p.items()} for p in (parts, others)
    )
    if described != found:
        raise FormatError(f"layer {name!r}: the model has {described}, not {found}")
    return [
        (variable, others[key][1].order(*tagged.axes).array)
        for key, (variable, tagged) in parts.items()
    ]


def _parts(layer: MoE) -> dict[str, tuple[nnx.Variable, Tagged]]:
    """Each variable of a layer with its value, by name."""
    assert isinstance(layer.experts, Variables)  # experts_of has checked it
    parts: dict[str, tuple[nnx.Variable, Tagged]] = {
        name: (getattr(layer, name), value(getattr(layer, name)))
        for name in nnx.state(layer)
        if name != "experts"
    }
    tagged = jax.tree.leaves(layer.experts.tree(), is_leaf=is_tagged)
    for name, leaf in zip(layer.experts.names, tagged, strict=True):
        parts[f"experts.{name}"] = layer.experts.leaves[name], leaf
    return parts


def _kind(tagged: Tagged) -> tuple[str, dict[str, int]]:
    return str(tagged.dtype), tagged.sizes

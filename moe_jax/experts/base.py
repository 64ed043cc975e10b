"""What an expert is.

Experts are one pytree whose arrays have an `expert` axis, and a call. The call is that of a single
expert, without the `expert` axis: it takes rows {s, d} and returns rows {s, d}.

    - A `Tagged` leaf has the axis by name, anywhere.
    - A bare array leaf (as in a Flax module made with `nnx.vmap`) has it in front.

Rows come to the call as the user gave them to the layer: `Tagged`, or bare arrays [s, d].

Such an expert is called on batches of rows under `jax.vmap`. Some may be rows of zeros that fill a
batch up: what it makes of those is not used, but must have finite gradients.

The layers of this package do better: they derive from `Expert` and are written against a `Rows`
object, which multiplies rows with the weights of the experts they belong to, so that one definition
serves all ways of dispatch, with packed weights and grouped matmuls.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moe_jax.quantization.packed import Packed
from moe_jax.tagged import Tagged, is_tagged


class Rows(Protocol):
    """Rows and the experts they belong to."""

    def linear(self, x: Tagged, weight: Any, bias: Tagged | None = None) -> Tagged:
        """x {..., in}, weight {expert, out, in}, bias {expert, out} -> {..., out}."""
        ...

    def select(self, parameter: Tagged) -> Tagged:
        """A parameter {expert, ...} as it applies to the rows."""
        ...

    def call(self, expert: Any, x: Tagged) -> Tagged:
        """Calls each expert on its rows, x {..., d} -> {..., d}."""
        ...


class Expert:
    """Base of experts that are written against `Rows`; subclasses are frozen pytrees."""

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        """Rows {..., d} -> rows {..., d}, the weights of `self` having an `expert` axis."""
        raise NotImplementedError(f"{type(self).__name__} must define apply")

    def __call__(self, x: Any) -> Any:
        """Rows {s, d}, `Tagged` or bare, by one expert: `self` without the `expert` axis."""
        if is_tagged(x):
            return self.apply(x, OneExpert())
        return self.apply(Tagged(x, ("s", "d")), OneExpert()).untag("s", "d")


class OneExpert:
    """All rows belong to the one expert there is; weights have no `expert` axis."""

    def linear(self, x: Tagged, weight: Any, bias: Tagged | None = None) -> Tagged:
        y = x.dot(decoded(weight, x.dtype), "in")
        return y if bias is None else y + bias.astype(x.dtype)

    def select(self, parameter: Tagged) -> Tagged:
        return parameter

    def call(self, expert: Any, x: Tagged) -> Tagged:
        return expert(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnBareArrays:
    """An expert whose call takes and returns bare arrays, seen as one that takes `Tagged`."""

    expert: Any

    def __call__(self, x: Tagged) -> Tagged:
        y = self.expert(x.array)
        if is_tagged(y) or jnp.shape(y) != x.shape:
            raise ValueError(
                f"an expert called on a bare array of shape {x.shape} must return one like it, "
                f"it returned {y if is_tagged(y) else jnp.shape(y)}"
            )
        return Tagged(y, x.axes)


def apply_experts(experts: Any, x: Tagged, rows: Rows) -> Tagged:
    """Applies experts to rows {..., d}."""
    return experts.apply(x, rows) if isinstance(experts, Expert) else rows.call(experts, x)


def decoded(weight: Tagged | Packed, dtype: Any) -> Tagged:
    """The weight as floats of `dtype`. Raises TypeError where it holds integers."""
    if isinstance(weight, Packed):
        return weight.dequantize(dtype)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"weights must be floats or packed, got {weight.dtype} {weight}")
    return weight.astype(dtype)


def check_experts(experts: Any, expected: int) -> None:
    """Checks that every array of the experts has an `expert` axis of the expected size.

    Raises:
        ValueError: an array lacks the axis, or its size is not that of the gating.
    """
    for path, leaf in jax.tree.leaves_with_path(experts, is_leaf=is_tagged):
        if is_tagged(leaf):
            size = leaf.size("expert")
        elif jnp.ndim(leaf):
            size = leaf.shape[0]
        else:
            raise ValueError(
                f"experts{jax.tree_util.keystr(path)} has no axes: expected an expert axis in front"
            )
        if size != expected:
            raise ValueError(
                f"experts{jax.tree_util.keystr(path)} holds {size} experts, "
                f"the gating has {expected}"
            )


def take_experts(experts: Any, index: jax.Array) -> Any:
    """The experts with the `expert` axis replaced by picking `index`, a bare scalar."""
    return jax.tree.map(lambda leaf: _take(leaf, index), experts, is_leaf=is_tagged)


def map_experts(function: Callable[..., Any], experts: Any, *args: Any) -> Any:
    """`jax.vmap` of function(expert, *args) over experts and the first axes of bare `args`."""
    leaves, treedef = jax.tree.flatten(experts, is_leaf=is_tagged)
    places = [leaf.position("expert") if is_tagged(leaf) else 0 for leaf in leaves]
    arrays = [leaf.array if is_tagged(leaf) else leaf for leaf in leaves]

    def one(arrays: Any, *args: Any) -> Any:
        expert = [
            Tagged(array, tuple(n for n in leaf.axes if n != "expert"))
            if is_tagged(leaf)
            else array
            for leaf, array in zip(leaves, arrays, strict=True)
        ]
        return function(jax.tree.unflatten(treedef, expert), *args)

    return jax.vmap(one, in_axes=(places, *(0 for _ in args)))(arrays, *args)


def _take(leaf: Any, index: jax.Array) -> Any:
    if is_tagged(leaf):
        return leaf.take(index, "expert")
    return jnp.take(leaf, index, axis=0, mode="clip")

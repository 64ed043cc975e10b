"""Tagged arrays and experts as Flax variables.

A Flax variable should hold one array: the optimisers of Flax take a variable apart that holds more.
So names go into a variable's metadata, and experts into one variable for each of their arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.tagged import Tagged


class Fixed(nnx.Variable):
    """An array that training leaves alone, such as packed weights; not an `nnx.Param`."""


def param(value: Tagged) -> nnx.Param:
    """A Param of the array, with the names of its axes as metadata."""
    return nnx.Param(value.array, axes=value.axes)


def fixed(value: Tagged) -> Fixed:
    """The same, for an array that training leaves alone."""
    return Fixed(value.array, axes=value.axes)


def value(variable: nnx.Variable) -> Tagged:
    """The value of a variable that `param` or `fixed` made."""
    return Tagged(variable.get_value(), variable.get_metadata()["axes"])


class Variables(nnx.Module):
    """A pytree with a variable for each array: `Param` for floats, `Fixed` for integers.

    Attributes:
        leaves: the variables by the path of their array, for example `gate_up.blocks`.
        names: those paths in the order of the pytree's leaves.
        treedef: the pytree's structure.
    """

    def __init__(self, tree: Any) -> None:
        paths, self.treedef = jax.tree.flatten_with_path(tree)
        self.names = tuple(_name(path) for path, _ in paths)
        self.leaves = nnx.Dict(
            {name: _variable(leaf) for name, (_, leaf) in zip(self.names, paths, strict=True)}
        )

    def tree(self) -> Any:
        """The pytree with the variables' present values."""
        return jax.tree.unflatten(
            self.treedef, [self.leaves[name].get_value() for name in self.names]
        )


def _variable(leaf: Any) -> nnx.Variable:
    return nnx.Param(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else Fixed(leaf)


def _name(path: tuple[Any, ...]) -> str:
    """A path without the `array` that every `Tagged` ends with."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".array")

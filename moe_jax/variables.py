"""Tagged arrays and experts as Flax variables.

A Flax variable should hold one array: the optimisers of Flax take a variable apart that holds more.
So names go into a variable's metadata, and experts into one variable for each of their arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.quantization.packed import is_packed
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
    """A pytree with a variable for each array: `Param` for floats, `Fixed` for the rest.

    The rest is integers, and all of a packed weight.

    Attributes:
        leaves: the variables by the path of their array, for example `gate_up.blocks`.
        names: those paths in the order of the pytree's leaves.
        treedef: the pytree's structure.
    """

    def __init__(self, tree: Any) -> None:
        paths, self.treedef = jax.tree.flatten_with_path(tree)
        self.names = tuple(_name(path) for path, _ in paths)
        trained = jax.tree.leaves(jax.tree.map(_trained, tree, is_leaf=is_packed))
        self.leaves = nnx.Dict(
            {
                name: nnx.Param(leaf) if is_trained else Fixed(leaf)
                for name, (_, leaf), is_trained in zip(self.names, paths, trained, strict=True)
            }
        )

    def tree(self) -> Any:
        """The pytree with the variables' present values."""
        return jax.tree.unflatten(
            self.treedef, [self.leaves[name].get_value() for name in self.names]
        )


def _trained(node: Any) -> Any:
    """Whether an array is trained, for each in `node`, an array or a packed weight."""
    if is_packed(node):
        return jax.tree.map(lambda _: False, node)
    return jnp.issubdtype(node.dtype, jnp.inexact)


def _name(path: tuple[Any, ...]) -> str:
    """A path without the `array` that every `Tagged` ends with."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".array")

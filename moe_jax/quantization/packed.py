"""What all packed weights have in common.

A packed weight is a pytree of `Tagged` leaves that stands for an array of floats. Every layer and
every way of dispatch takes one where it takes a weight: they read its logical axes, pick experts
with `take`, and decode with `dequantize`. Nothing of it is trained.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.rules import Rules
from moe_jax.tagged import Tagged, is_tagged

_FLOAT_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Packed(abc.ABC):
    """Base of packed weights: frozen dataclasses, registered as pytrees, with `Tagged` fields.

    A format says which logical axes it has, of which sizes, what sharding rules its leaves follow,
    how it is checked and how it is decoded. Constructors check nothing, because JAX puts all sorts
    of things in the place of leaves; every method does.
    """

    axis: str
    """The logical axis along which elements are packed; it is the last."""

    @property
    @abc.abstractmethod
    def axes(self) -> tuple[str, ...]:
        """The logical axes, the packed one last."""

    @property
    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """The size of each logical axis by name."""

    @property
    def whole(self) -> tuple[str, ...]:
        """The logical axes along which `take` can pick entries."""
        return self.axes[:-1]

    @abc.abstractmethod
    def check(self) -> Self:
        """Returns `self` if the leaves belong together; raises TypeError or ValueError if not."""

    @abc.abstractmethod
    def dequantize(self, dtype: Any = jnp.bfloat16) -> Tagged:
        """The decoded floats, float32, bfloat16 or float16, with the logical axes."""

    @abc.abstractmethod
    def rules_for_leaves(self, rules: Rules) -> Mapping[str, str | tuple[str, ...] | None]:
        """Sharding rules for the leaves, from rules for the logical axes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.sizes.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by the leaves."""
        leaves = jax.tree.leaves(self, is_leaf=is_tagged)
        return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def size(self, axis: str) -> int:
        """The size of one logical axis. Raises ValueError where there is no such axis."""
        if axis not in self.axes:
            raise ValueError(f"no axis {axis!r} among {self.axes}")
        return self.sizes[axis]

    def take(self, indices: Tagged | jax.Array | int, axis: str) -> Self:
        """Picks entries along one of the axes `whole`, as `Tagged.take` does."""
        self.check()
        if axis not in self.whole:
            raise ValueError(f"take works along {self.whole}, got {axis!r}")
        return self.map_leaves(lambda leaf: leaf.take(indices, axis) if axis in leaf.axes else leaf)

    def rename(self, **names: str) -> Self:
        """Gives logical axes new names: `w.rename(out="rows")`."""
        for old in names:
            self.size(old)
        renamed = self.map_leaves(
            lambda leaf: leaf.rename(**{o: n for o, n in names.items() if o in leaf.axes})
        )
        return _replace(renamed, axis=names.get(self.axis, self.axis))

    def partition(self, mesh: Mesh, rules: Rules) -> Self:
        """Places all leaves as `rules` say for the logical axes; blocks are never cut."""
        self.check()
        rules = self.rules_for_leaves(rules)
        return self.map_leaves(lambda leaf: leaf.partition(mesh, rules))

    def map_leaves(self, function: Callable[[Tagged], Tagged]) -> Self:
        """The same with each `Tagged` leaf replaced."""
        return jax.tree.map(function, self, is_leaf=is_tagged)

    def __str__(self) -> str:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        parts = (f"{f.name}={_shown(getattr(self, f.name))}" for f in fields)
        return f"{type(self).__name__}({', '.join(parts)})"


class InBlocks(Packed):
    """Base of packed weights that are cut into blocks along one axis, with a scale a block.

    Attributes:
        scales: {..., block}, the last axis named as `block` says.
        axis: name of the logical axis that is cut into blocks.
        block: name of the axis of blocks in the leaves.
    """

    scales: Tagged
    block: ClassVar[str] = "block"

    @property
    @abc.abstractmethod
    def block_size(self) -> int:
        """Elements that share a scale."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The logical axes, the one cut into blocks last."""
        return (*self.scales.axes[:-1], self.axis)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each logical axis by name."""
        sizes = self.check().scales.sizes
        return {n: sizes[n] for n in self.axes[:-1]} | {
            self.axis: sizes[self.block] * self.block_size
        }

    def rules_for_leaves(self, rules: Rules) -> Mapping[str, str | tuple[str, ...] | None]:
        """Sharding rules for the leaves; the bytes of a block are never cut."""
        return leaf_rules(rules, self.axis, self.block)


def leaf_rules(
    rules: Rules, axis: str = "in", block: str = "block"
) -> Mapping[str, str | tuple[str, ...] | None]:
    """Sharding rules for blocks of bytes along `axis`, from rules for the logical axes."""
    return {**rules, block: rules.get(axis), "byte": None}


def check_blocks(what: str, blocks: Tagged, scales: Tagged, bytes_per_block: int) -> None:
    """Raises ValueError unless blocks {..., block, byte} have a scale {..., block} each."""
    if scales.axes[-1:] != ("block",) or blocks.axes != (*scales.axes, "byte"):
        raise ValueError(
            f"{what} needs blocks {{..., block, byte}} and scales {{..., block}} with equal "
            f"leading axes, got blocks {blocks} and scales {scales}"
        )
    sizes = blocks.sizes
    if sizes.pop("byte") != bytes_per_block or sizes != scales.sizes:
        raise ValueError(
            f"{what} needs {bytes_per_block} bytes a block and one scale for each block, "
            f"got blocks {blocks} and scales {scales}"
        )


def is_packed(value: Any) -> TypeGuard[Packed]:
    """Whether `value` is a packed weight; for `is_leaf` in tree functions."""
    return isinstance(value, Packed)


def check_dtypes(what: str, **leaves: tuple[Tagged, Any]) -> None:
    """Raises TypeError unless each leaf has the dtype given with it."""
    for name, (leaf, dtype) in leaves.items():
        if leaf.dtype != dtype:
            raise TypeError(f"{what} {name} must be {jnp.dtype(dtype).name}, got {leaf.dtype}")


def check_encodable(w: Any, axis: str, block_size: int) -> None:
    """Checks what is to be encoded in blocks of elements along an axis.

    Raises:
        TypeError: `w` is not a `Tagged` of float32, bfloat16 or float16.
        ValueError: no such axis, or its size is not divisible by `block_size`.
    """
    if not isinstance(w, Tagged):
        raise TypeError(f"expected a Tagged array, got {type(w).__name__}: name its axes with tag")
    float_type(w.dtype)
    if w.size(axis) % block_size:
        raise ValueError(f"axis {axis!r} of {w} must have a size divisible by {block_size}")


def float_type(dtype: Any) -> Any:
    """`dtype` as a NumPy dtype. Raises TypeError unless packed weights convert with it."""
    dtype = jnp.dtype(dtype)
    if dtype not in _FLOAT_TYPES:
        raise TypeError(
            f"packed weights convert to and from float32, bfloat16 and float16, not {dtype}"
        )
    return dtype


def _replace(weight: Any, **changes: Any) -> Any:
    return dataclasses.replace(weight, **changes)


def _shown(value: Any) -> str:
    return str(value) if is_tagged(value) else repr(value)

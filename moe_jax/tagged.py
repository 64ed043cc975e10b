"""Arrays whose axes have names.

Positions are a poor way to say which axis is meant: with a hidden size equal to the intermediate
size, a swapped weight multiplies without complaint and the numbers are wrong. A `Tagged` array
carries the name of each axis, and its operations take names:

    x = tag(activations, "s", "d")                     # tokens, features
    w = tag(weight, "expert", "out", "in")
    y = x.rename(d="in").dot(w, "in")                  # {s, expert, out}

The idea is that of ZML's tagged shapes (and of named tensors before it). Only names are kept,
never sizes: sizes belong to the array, so a `Tagged` stays valid where JAX puts something else in
the array's place (abstract values, shards inside `shard_map`, cotangents).

A transformation that removes an axis from the array without knowing its name (`jax.vmap`,
`jax.lax.scan` over a `Tagged`) leaves more names than axes. Every operation that needs the axes
then raises; `vmap` and `scan` of `moe_jax.transforms` remove and restore the name as well.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.rules import Rules, check_divisible


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tagged:
    """An array and the names of its axes.

    Make one with `tag`, which checks that names and axes are equally many. Arithmetic between two
    `Tagged` arrays broadcasts by name: the axes of one must include the axes of the other, and the
    result has the order of the larger.

    Attributes:
        array: the array, or whatever JAX puts in its place.
        axes: one name for each axis of `array`, without repetition.
    """

    array: Any
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    # without this NumPy takes `array + tagged` apart, into an array of Tagged scalars
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        _check_names(self.axes)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis by name."""
        return dict(zip(self.axes, self._checked().shape, strict=True))

    def size(self, axis: str) -> int:
        """The size of one axis."""
        return self._checked().shape[self.position(axis)]

    def position(self, axis: str) -> int:
        """Where `axis` lies in `array`. Raises ValueError where there is no such axis."""
        if axis not in self.axes:
            raise ValueError(f"no axis {axis!r} among {_braces(self.axes)}")
        return self.axes.index(axis)

    def untag(self, *axes: str) -> jax.Array:
        """The bare array with its axes in the stated order, which must name all of them."""
        return self.order(*axes).array

    def order(self, *axes: str) -> "Tagged":
        """Transposes to the stated order, which must name every axis once."""
        _check_names(axes)
        if set(axes) != set(self.axes):
            raise ValueError(f"expected the axes {_braces(axes)} in some order, got {self}")
        array = self._checked()
        if axes == self.axes:
            return self
        return Tagged(jnp.transpose(array, [self.axes.index(a) for a in axes]), axes)

    def rename(self, **names: str) -> "Tagged":
        """Gives axes new names: `x.rename(d="in")`."""
        for old in names:
            self.position(old)
        return Tagged(self.array, tuple(names.get(a, a) for a in self.axes))

    def astype(self, dtype: Any) -> "Tagged":
        return Tagged(self.array.astype(dtype), self.axes)

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Tagged":
        """Applies an elementwise function, one that keeps the shape."""
        array = self._checked()
        result = function(array)
        if result.shape != array.shape:
            raise ValueError(
                f"the function given to map must keep the shape {array.shape}, "
                f"it returned {result.shape}"
            )
        return Tagged(result, self.axes)

    def sum(self, axis: str) -> "Tagged":
        """Sums over one axis and drops it."""
        array, position = self._checked(), self.position(axis)
        return Tagged(array.sum(position), self.axes[:position] + self.axes[position + 1 :])

    def dot(
        self,
        other: "Tagged",
        over: str | tuple[str, ...],
        *,
        preferred_element_type: Any = None,
        precision: Any = None,
    ) -> "Tagged":
        """Multiplies and sums over the axes `over`, which both must have.

        Axes that both have and that are not in `over` are batch axes. The result's axes are the
        batch axes, then what remains of `self`, then what remains of `other`.
        """
        over = (over,) if isinstance(over, str) else tuple(over)
        _check_names(over)
        if not isinstance(other, Tagged):
            raise TypeError(f"cannot multiply {self} with an array without names: tag it")
        a, b = self._checked(), other._checked()
        for axis in over:
            if self.size(axis) != other.size(axis):
                raise ValueError(f"axis {axis!r} has different sizes in {self} and {other}")
        batch = tuple(n for n in self.axes if n in other.axes and n not in over)
        for axis in batch:
            if self.size(axis) != other.size(axis):
                raise ValueError(
                    f"axis {axis!r} is in both {self} and {other}, with different sizes: "
                    f"rename one if they are not the same axis"
                )
        result = lax.dot_general(
            a,
            b,
            (
                ([self.axes.index(n) for n in over], [other.axes.index(n) for n in over]),
                ([self.axes.index(n) for n in batch], [other.axes.index(n) for n in batch]),
            ),
            preferred_element_type=preferred_element_type,
            precision=precision,
        )
        free = tuple(n for x in (self, other) for n in x.axes if n not in over + batch)
        return Tagged(result, batch + free)

    def take(self, indices: "Tagged | jax.Array | int", axis: str) -> "Tagged":
        """Picks entries along `axis`; the axes of `indices` take its place.

        An index that is a Python int must be within the axis, and may count from its end. Indices
        in arrays, whose values are unknown inside jit, are moved to the nearest end if outside.
        """
        array, position = self._checked(), self.position(axis)
        if isinstance(indices, int):
            size = array.shape[position]
            if not -size <= indices < size:
                raise ValueError(f"index {indices} is outside axis {axis!r} of {self}")
            indices = indices % size
        if isinstance(indices, Tagged):
            picked, names = indices._checked(), indices.axes
        else:
            picked, names = jnp.asarray(indices), ()
            if picked.ndim:
                raise ValueError("indices with axes must be Tagged, so that the result's are named")
        if not jnp.issubdtype(picked.dtype, jnp.integer):
            raise TypeError(f"indices must be integers, got {picked.dtype}")
        axes = self.axes[:position] + names + self.axes[position + 1 :]
        _check_names(axes)
        if not array.shape[position] and picked.size:
            raise ValueError(f"cannot pick from axis {axis!r} of {self}, which is empty")
        where = (slice(None),) * position + (picked,)
        return Tagged(array.at[where].get(mode="clip", wrap_negative_indices=False), axes)

    def top_k(self, k: int, axis: str, into: str) -> "tuple[Tagged, Tagged]":
        """The `k` largest entries along `axis` and their indices (int32), largest first.

        The axis `into` replaces `axis` and is the last. Of equal entries the one with the lowest
        index comes first; -0 is less than 0.
        """
        size = self.size(axis)
        if not 0 < k <= size:
            raise ValueError(f"k must be between 1 and the size {size} of axis {axis!r}, got {k}")
        rest = tuple(n for n in self.axes if n != axis)
        values, indices = lax.top_k(self.untag(*rest, axis), k)
        return Tagged(values, (*rest, into)), Tagged(indices, (*rest, into))

    def split(self, axis: str, **parts: int) -> "Tagged":
        """Splits an axis into several, slowest first: `w.split("in", block=-1, lane=32)`."""
        array, position = self._checked(), self.position(axis)
        size, unknown = array.shape[position], [n for n, p in parts.items() if p == -1]
        known = math.prod(p for p in parts.values() if p != -1)
        fits = known > 0 and size % known == 0 if unknown else known == size
        if not fits or len(unknown) > 1 or min(parts.values(), default=0) < -1:
            raise ValueError(f"axis {axis!r} of size {size} does not split into {parts}")
        new = [size // known if p == -1 else p for p in parts.values()]
        shape = (*array.shape[:position], *new, *array.shape[position + 1 :])
        return Tagged(
            array.reshape(shape), (*self.axes[:position], *parts, *self.axes[position + 1 :])
        )

    def merge(self, axes: tuple[str, ...], into: str) -> "Tagged":
        """Joins axes into one, the first named the slowest, at the leftmost place of them."""
        _check_names(axes)
        if not axes:
            raise ValueError(f"merge needs the names of the axes of {self} to join, got none")
        position = min(self.position(axis) for axis in axes)
        before = tuple(n for n in self.axes[:position] if n not in axes)
        after = tuple(n for n in self.axes[position:] if n not in axes)
        array = self.untag(*before, *axes, *after)
        end = len(before) + len(axes)
        size = 1
        for length in array.shape[len(before) : end]:
            size *= length
        shape = (*array.shape[: len(before)], size, *array.shape[end:])
        return Tagged(array.reshape(shape), (*before, into, *after))

    def spec(self, rules: Rules) -> PartitionSpec:
        """The PartitionSpec that `rules` (axis name -> mesh axis) give this array."""
        return PartitionSpec(*(rules.get(axis) for axis in self.axes))

    def partition(self, mesh: Mesh, rules: Rules) -> Self:
        """Places the array, or constrains it inside jit, as `rules` say.

        Raises ValueError where mesh axes do not divide the array's axis, or are not the mesh's.
        """
        for axis, size in self.sizes.items():
            check_divisible(str(self), axis, size, mesh, rules)
        sharding = NamedSharding(mesh, self.spec(rules))
        return dataclasses.replace(self, array=lax.with_sharding_constraint(self.array, sharding))

    def __str__(self) -> str:
        shape = getattr(self.array, "shape", ())
        if len(shape) != len(self.axes):
            return _braces(self.axes)
        return "{" + ", ".join(f"{n}={s}" for n, s in zip(self.axes, shape, strict=True)) + "}"

    def _checked(self) -> Any:
        """The array, after a check that it has as many axes as there are names."""
        ndim = jnp.ndim(self.array)
        if ndim != len(self.axes):
            raise ValueError(
                f"an array of {ndim} axes carries the {len(self.axes)} names {_braces(self.axes)}: "
                f"a transformation changed its axes. Use moe_jax.transforms.vmap or "
                f"moe_jax.transforms.scan, which change the names too"
            )
        return self.array

    def _binary(self, other: Any, operation: Callable[[Any, Any], Any]) -> "Tagged":
        if not isinstance(other, Tagged):
            if jnp.ndim(other):
                raise TypeError(
                    f"cannot combine {self} with an array without names: tag it, or use untag"
                )
            return Tagged(operation(self._checked(), other), self.axes)
        if set(other.axes) <= set(self.axes):
            return Tagged(operation(self._checked(), other.expand_to(self)), self.axes)
        if set(self.axes) <= set(other.axes):
            return Tagged(operation(self.expand_to(other), other._checked()), other.axes)
        raise ValueError(f"neither of {self} and {other} has all the axes of the other")

    def expand_to(self, larger: "Tagged") -> jax.Array:
        """The bare array with the axes of `larger`, size 1 where it lacks one."""
        names = tuple(n for n in larger.axes if n in self.axes)
        array = self.untag(*names)
        for name in names:
            if self.size(name) != larger.size(name):
                raise ValueError(f"axis {name!r} has different sizes in {self} and {larger}")
        return array.reshape([self.size(n) if n in names else 1 for n in larger.axes])

    def __add__(self, other: Any) -> "Tagged":
        return self._binary(other, operator.add)

    def __radd__(self, other: Any) -> "Tagged":
        return self._binary(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> "Tagged":
        return self._binary(other, operator.sub)

    def __rsub__(self, other: Any) -> "Tagged":
        return self._binary(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> "Tagged":
        return self._binary(other, operator.mul)

    def __rmul__(self, other: Any) -> "Tagged":
        return self._binary(other, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> "Tagged":
        return self._binary(other, operator.truediv)

    def __neg__(self) -> "Tagged":
        return Tagged(-self.array, self.axes)


def tag(array: Any, *axes: str) -> Tagged:
    """Names the axes of an array.

    Raises:
        TypeError: `array` is tagged already.
        ValueError: names and axes are not equally many, or a name stands twice.
    """
    if isinstance(array, Tagged):
        raise TypeError(f"already tagged: {array}. Use rename to change names")
    if not hasattr(array, "shape") or isinstance(array, np.ndarray):
        array = jnp.asarray(array)
    tagged = Tagged(array, axes)
    if len(array.shape) != len(axes):
        raise ValueError(
            f"an array of shape {tuple(array.shape)} needs {len(array.shape)} tags, "
            f"got {len(axes)}: {_braces(axes)}"
        )
    return tagged


def is_tagged(value: Any) -> bool:
    """Whether `value` is `Tagged`; for `is_leaf` in tree functions."""
    return isinstance(value, Tagged)


def _check_names(axes: tuple[str, ...]) -> None:
    for axis in axes:
        if not isinstance(axis, str) or not axis:
            raise TypeError(f"an axis name must be a non-empty string, got {axis!r}")
    repeated = sorted({axis for axis in axes if axes.count(axis) > 1})
    if repeated:
        raise ValueError(f"repeated axis names {repeated} in {_braces(axes)}: rename one of each")


def _braces(axes: tuple[str, ...]) -> str:
    return "{" + ", ".join(axes) + "}"

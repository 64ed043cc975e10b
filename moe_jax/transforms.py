"""`vmap` and `scan` over an axis by its name."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from moe_jax.tagged import Tagged, is_tagged


def vmap(function: Callable[..., Any], axis: str) -> Callable[..., Any]:
    """`jax.vmap` over the axis of that name.

    In the arguments, every `Tagged` that has the axis is mapped over it; everything else is passed
    whole. Results get the axis back, as their first; bare arrays are stacked in front.
    """

    def mapped(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args, is_leaf=is_tagged)
        places = [_place(leaf, axis) for leaf in leaves]
        if all(place is None for place in places):
            raise ValueError(f"no argument has the axis {axis!r}")
        arrays = [leaf.array if is_tagged(leaf) else leaf for leaf in leaves]

        def inner(*arrays: Any) -> Any:
            rebuilt = [
                _without(leaf, array, axis) for leaf, array in zip(leaves, arrays, strict=True)
            ]
            return function(*jax.tree.unflatten(treedef, rebuilt))

        return _restore(jax.vmap(inner, in_axes=places)(*arrays), axis)

    return mapped


def scan(
    function: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, axis: str
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the axis of that name, which every `Tagged` in `xs` must have.

    Results collected over the steps get the axis back, as their first.
    """
    leaves, treedef = jax.tree.flatten(xs, is_leaf=is_tagged)
    arrays = []
    for leaf in leaves:
        if not is_tagged(leaf):
            raise TypeError(f"scan over axis {axis!r} needs Tagged arrays, got {type(leaf)}")
        rest = tuple(n for n in leaf.axes if n != axis)
        leaf.position(axis)
        arrays.append(leaf.untag(axis, *rest))

    def body(carry: Any, arrays: Any) -> tuple[Any, Any]:
        slices = [_without(leaf, array, axis) for leaf, array in zip(leaves, arrays, strict=True)]
        return function(carry, jax.tree.unflatten(treedef, slices))

    carry, collected = lax.scan(body, init, arrays)
    return carry, _restore(collected, axis)


def _place(leaf: Any, axis: str) -> int | None:
    return leaf.position(axis) if is_tagged(leaf) and axis in leaf.axes else None


def _without(leaf: Any, array: Any, axis: str) -> Any:
    """`leaf` with `array` inside and without the name `axis`."""
    if not is_tagged(leaf):
        return array
    return Tagged(array, tuple(n for n in leaf.axes if n != axis))


def _restore(results: Any, axis: str) -> Any:
    """Puts the name `axis` in front of every `Tagged` of a mapped or scanned result."""
    return jax.tree.map(
        lambda leaf: Tagged(leaf.array, (axis, *leaf.axes)) if is_tagged(leaf) else leaf,
        results,
        is_leaf=is_tagged,
    )

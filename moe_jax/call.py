"""A call's arrays as rows {s, ...}, whatever token axes and kind they came with."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from moe_jax.experts.base import Expert, OnBareArrays
from moe_jax.tagged import Tagged, is_tagged


@dataclasses.dataclass(frozen=True)
class Call:
    """A call's arrays with all token axes merged into `s`, and the way back.

    Attributes:
        experts: ready to be called with `Tagged` rows.
        x: {s, d}; masked tokens are zero.
        per_token: {s, expert} or {s, top_expert}; 0 for masked tokens.
        mask: bool {s}, or None.
        lead: the token axes.
        sizes: their sizes.
        like: x as given.
    """

    experts: Any
    x: Tagged
    per_token: Tagged
    mask: Tagged | None
    lead: tuple[str, ...]
    sizes: tuple[int, ...]
    like: Any

    @classmethod
    def of(cls, experts: Any, x: Any, per_token: Any, last: str, mask: Any) -> "Call":
        like = x
        if not is_tagged(x):
            x = like = jnp.asarray(x)
            x = Tagged(x, (*token_axes(jnp.ndim(x) - 1), "d"))
            if not isinstance(experts, Expert):
                experts = OnBareArrays(experts)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floats, got {x.dtype}")
        x.position("d")
        lead = tuple(n for n in x.axes if n != "d")
        if not lead:
            raise ValueError(f"x needs a token axis besides 'd', got {x}")
        sizes = tuple(x.size(n) for n in lead)
        rows = _merge(x, lead, "d")
        per_token = _merge(like_tokens(per_token, x, "d", last), lead, last)
        if mask is not None:
            mask = Tagged(like_tokens(mask, x, "d").untag(*lead).reshape(-1), ("s",))
            if mask.dtype != jnp.bool_:
                raise TypeError(f"token_mask must be bool, got {mask.dtype}")
            keep = mask.array[:, None]
            rows = rows.map(lambda array: jnp.where(keep, array, 0))
            per_token = per_token.map(lambda array: jnp.where(keep, array, 0))
        return cls(experts, rows, per_token, mask, lead, sizes, like)

    @property
    def num_tokens(self) -> int:
        return self.x.size("s")

    def restore(self, y: Tagged) -> Any:
        """{s, d} -> the axes and kind of x as given; masked tokens become zero."""
        if self.mask is not None:
            keep = self.mask.array[:, None]
            y = y.map(lambda array: jnp.where(keep, array, 0))
        array = y.untag("s", "d").reshape(*self.sizes, y.size("d"))
        result = Tagged(array, (*self.lead, "d"))
        return result.order(*self.like.axes) if is_tagged(self.like) else result.array


def _merge(x: Tagged, lead: tuple[str, ...], last: str) -> Tagged:
    array = x.untag(*lead, last)
    return Tagged(array.reshape(math.prod(array.shape[:-1]), array.shape[-1]), ("s", last))


def like_tokens(value: Any, x: Tagged, without: str, last: str | None = None) -> Tagged:
    """`value` with the axes of `x` except `without`, and `last`; tags a bare array so."""
    lead = tuple(n for n in x.axes if n != without)
    axes = lead if last is None else (*lead, last)
    if not is_tagged(value):
        value = jnp.asarray(value)
        if value.ndim != len(axes):
            raise ValueError(
                f"expected an array with the axes ({', '.join(axes)}), got shape {value.shape}"
            )
        value = Tagged(value, axes)
    if set(value.axes) != set(axes):
        raise ValueError(f"expected the axes ({', '.join(axes)}), got {value}")
    for axis in lead:
        if value.size(axis) != x.size(axis):
            raise ValueError(f"axis {axis!r} has different sizes in {value} and {x}")
    return value


def token_axes(count: int) -> tuple[str, ...]:
    """Names for the token axes of a bare array."""
    if count < 1:
        raise ValueError("x needs at least two axes: tokens and d")
    return (*(f"b{i}" for i in range(count - 1)), "s")

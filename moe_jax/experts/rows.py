"""Three ways for rows to meet experts, one for each kind of dispatch.

EveryExpert     rows {expert, slot, d} or {s, d}: every expert works on its own or on all rows
ChosenExperts   rows {s, top_expert, d}: each row brings its expert's weights
SortedRows      rows {row, d}, sorted by expert: grouped matmuls
"""

import dataclasses
from typing import Any

import jax

from moe_jax.experts.base import decoded, map_experts, take_experts
from moe_jax.kernels.grouped_matmul import grouped_matmul
from moe_jax.kernels.grouped_matmul.reference import from_blocks, plan_blocks, to_blocks
from moe_jax.tagged import Tagged


@dataclasses.dataclass(frozen=True)
class EveryExpert:
    """Every expert on rows of its own {expert, ...}, or on all rows {s, ...}."""

    def linear(self, x: Tagged, weight: Any, bias: Tagged | None = None) -> Tagged:
        y = x.dot(decoded(weight, x.dtype), "in")
        return y if bias is None else y + bias.astype(x.dtype)

    def select(self, parameter: Tagged) -> Tagged:
        return parameter

    def call(self, expert: Any, x: Tagged) -> Tagged:
        if "expert" not in x.axes:
            if not jax.tree.leaves(expert):
                return expert_call(expert, x)
            return _named(map_experts(lambda e: expert_call(e, x), expert))
        rest = tuple(n for n in x.axes if n not in ("expert", "d"))
        own = x.untag("expert", *rest, "d")
        y = _named(map_experts(lambda e, a: expert_call(e, Tagged(a, ("s", "d"))), expert, own))
        return y.rename(s=rest[0])


@dataclasses.dataclass(frozen=True)
class ChosenExperts:
    """Each row with the weights of its own expert; reads only the experts that are chosen.

    Attributes:
        ids: int32, the expert of each row; its axes are the rows' axes.
    """

    ids: Tagged

    def linear(self, x: Tagged, weight: Any, bias: Tagged | None = None) -> Tagged:
        y = x.dot(decoded(weight.take(self.ids, "expert"), x.dtype), "in")
        return y if bias is None else y + self.select(bias).astype(x.dtype)

    def select(self, parameter: Tagged) -> Tagged:
        return parameter.take(self.ids, "expert")

    def call(self, expert: Any, x: Tagged) -> Tagged:
        flat_ids = self.ids.merge(self.ids.axes, "row").array
        flat = x.merge(self.ids.axes, "row").untag("row", "d")

        def one(index: jax.Array, row: jax.Array) -> jax.Array:
            result = expert_call(take_experts(expert, index), Tagged(row[None], ("s", "d")))
            return result.untag("s", "d")[0]

        y = jax.vmap(one)(flat_ids, flat)
        return Tagged(y, ("row", "d")).split("row", **self.ids.sizes)


@dataclasses.dataclass(frozen=True)
class SortedRows:
    """Rows {row, ...} sorted by expert.

    Attributes:
        ids: int32 {row}, the expert of each row, ascending.
        group_sizes: int32 {expert}, how many rows each expert has. Rows past their sum are zero.
    """

    ids: Tagged
    group_sizes: Tagged

    def linear(self, x: Tagged, weight: Any, bias: Tagged | None = None) -> Tagged:
        y = grouped_matmul(x, weight, self.group_sizes)
        return y if bias is None else y + self.select(bias).astype(x.dtype)

    def select(self, parameter: Tagged) -> Tagged:
        return parameter.take(self.ids, "expert")

    def call(self, expert: Any, x: Tagged) -> Tagged:
        rows = x.untag("row", "d")
        blocks = plan_blocks(self.group_sizes.array, rows.shape[0])

        def one(step: tuple[jax.Array, jax.Array]) -> jax.Array:
            index, block = step
            result = expert_call(take_experts(expert, index), Tagged(block, ("s", "d")))
            return result.untag("s", "d")

        y = jax.lax.map(one, (blocks.expert, to_blocks(rows, blocks)))
        return Tagged(from_blocks(y, blocks), ("row", "d"))


def expert_call(expert: Any, x: Tagged) -> Tagged:
    """Calls an expert and checks what it returns."""
    y = expert(x)
    if not isinstance(y, Tagged) or set(y.axes) != set(x.axes) or y.sizes != {**y.sizes, **x.sizes}:
        raise ValueError(f"an expert must return rows like those it gets, {x}, it returned {y}")
    return y.order(*x.axes)


def _named(y: Tagged) -> Tagged:
    """Names the axis that `map_experts` put in front."""
    return Tagged(y.array, ("expert", *y.axes))

"""Rows of a table that is spread over devices: each gives those it holds, and they are summed.

XLA would do the same for several tokens. Of a single one it makes a slice before it looks at the
devices, for which it brings the whole table to each of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moe_jax.sharding import Sharding
from moe_jax.tagged import Tagged


def embed(table: Tagged, tokens: Tagged, sharding: Sharding | None) -> Tagged:
    """The rows of a table {voc, d} for tokens {b, s} -> {b, s, d}.

    A token outside the vocabulary stands for its nearest. With a sharding, whose rule for `voc`
    says which devices hold which rows, every one of these devices has all results.
    """
    owners = () if sharding is None else sharding.axes("voc")
    if sharding is None or sharding.count(*owners) == 1:
        return table.take(tokens.order("b", "s"), "voc")
    groups = tuple(axis for axis in sharding.axes("b") if axis not in owners)
    if tokens.size("b") % sharding.count(*groups):
        groups = ()
    rows = jax.shard_map(
        functools.partial(_own_rows, owners=owners),
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(owners), PartitionSpec(groups)),
        out_specs=PartitionSpec(groups),
    )(table.untag("voc", "d"), tokens.untag("b", "s"))
    return Tagged(rows, ("b", "s", "d"))


def _own_rows(table: jax.Array, tokens: jax.Array, *, owners: tuple[str, ...]) -> jax.Array:
    """A device's part [voc, d] of the table, tokens [b, s] -> [b, s, d], of all its parts."""
    held = table.shape[0]
    tokens = jnp.clip(tokens, 0, held * lax.axis_size(owners) - 1)
    place = tokens - lax.axis_index(owners) * held
    rows = table.at[place].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return lax.psum(rows, owners)

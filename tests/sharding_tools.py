"""Meshes of the tests."""

import jax

import moe_jax
from moe_jax import Sharding

MESHES = [
    (data, expert, model)
    for count in (1, 2, 4, 8)
    for data in (1, 2, 4, 8)
    for expert in (1, 2, 4, 8)
    for model in (1, 2, 4, 8)
    if data * expert * model == count
]
"""Every (data, expert, model) over 1, 2, 4 or 8 devices."""


def sharding(sizes: tuple[int, int, int], **options) -> Sharding:
    data, expert, model = sizes
    return Sharding(moe_jax.make_mesh(data=data, expert=expert, model=model), **options)


def bytes_by_device(tree) -> dict[jax.Device, int]:
    """How many bytes of the arrays of a pytree each device holds."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held

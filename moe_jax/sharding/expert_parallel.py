"""Experts spread over devices: each applies its own, and rows or sums travel between them.

What a device does with its experts is the layer as it is on one device, with ids counted from the
device's first expert. An id outside the device's experts stands for none there, so that the pairs
of other devices add nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moe_jax.dtypes import accumulator
from moe_jax.routing import Routing, own_pairs
from moe_jax.sharding.communication import capacity, choose_communication
from moe_jax.sharding.mesh import Sharding
from moe_jax.tagged import Rules, Tagged, is_tagged


class OwnRows(NamedTuple):
    """What a device's experts are applied to.

    Attributes:
        x: rows {s, d}.
        routing: {s, top_expert}, with ids among the device's experts.
        first_expert: int32 [], the first of the device's experts, among those of all devices.
        per_row: what the caller gave for each row, in the order of x; None where rows are those
            of other devices, too.
    """

    x: Tagged
    routing: Routing
    first_expert: jax.Array
    per_row: tuple[jax.Array, ...] | None


type Compute = Callable[[Any, OwnRows, int], Tagged]
"""What one device does: its experts, rows, and how many experts it has -> {s, d}."""


def expert_parallel(
    compute: Compute,
    experts: Any,
    x: Tagged,
    routing: Routing,
    num_experts: int,
    sharding: Sharding,
    per_row: tuple[jax.Array, ...] = (),
) -> Tagged:
    """Applies experts that are spread over a mesh.

    Args:
        compute: what a device does with its own experts.
        experts: with an `expert` axis, which the mesh axes of its rule divide.
        x: {s, d}. The number of rows need not divide the mesh.
        routing: ids and weights {s, top_expert}; an id outside the experts stands for none.
        num_experts: on all devices together.
        sharding: the mesh and its rules.
        per_row: arrays [s, ...] that `compute` wants with its rows, where it gets rows as they are
            here. Rows that fill them up are zeros.

    Returns:
        {s, d}.

    Raises:
        ValueError: the experts cannot be split evenly over the mesh.
        TypeError: `sharding` is not a `Sharding`.
    """
    if not isinstance(sharding, Sharding):
        raise TypeError(f"sharding must be a moe_jax.Sharding(mesh), got {sharding!r}")
    owners, groups = _owners(sharding), _groups(sharding)
    num_devices = sharding.count(*owners)
    sharding.of(experts)  # refuses what does not split evenly
    ids, weights = (part.untag("s", "top_expert") for part in (routing.ids, routing.weights))
    rows, (num_tokens, experts_per_token) = x.untag("s", "d"), ids.shape
    if not num_tokens:
        return x
    if num_tokens < sharding.count(*groups):
        groups = ()  # every device has all rows: sharing so few out would only cost messages
    form, axes = {
        "psum": (_summed, groups),
        "all_to_all": (_exchanged, (*groups, *owners)),
    }[_communication(num_tokens, experts_per_token, sharding)]
    parts = sharding.count(*axes)
    rows, weights = _filled_up(rows, parts, 0), _filled_up(weights, parts, 0)
    ids = _filled_up(ids, parts, num_experts)
    per_row = tuple(_filled_up(array, parts, 0) for array in per_row)

    local = functools.partial(
        form,
        _OnDevice(compute, num_experts // num_devices, owners),
    )
    by_rows = PartitionSpec(axes)
    y = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(_expert_specs(experts, {"expert": owners}), by_rows, by_rows, by_rows, by_rows),
        out_specs=by_rows,
    )(experts, rows, ids, weights, per_row)
    return Tagged(y[:num_tokens], ("s", "d"))


def before_routing(x: Tagged, experts_per_token: int, sharding: Sharding) -> Tagged:
    """x {..., d}, lying where its experts will want it.

    Where the devices that share the experts are all to have the same rows, they get them here,
    once, and route them themselves; otherwise XLA may spread the routing and gather each of its
    results. Tokens stay split over the other devices, by whichever axis of theirs comes first.
    """
    tokens = {axis: size for axis, size in x.sizes.items() if axis != "d"}
    num_tokens = math.prod(tokens.values())
    if sharding.count(*sharding.axes("expert")) == 1:
        return x
    if _communication(num_tokens, experts_per_token, sharding) != "psum":
        return x
    first = next((axis for axis, size in tokens.items() if size > 1), "d")
    rules = {} if first == "d" else {first: _groups(sharding)}
    return Sharding(sharding.mesh, rules).constrain(x)


def _owners(sharding: Sharding) -> tuple[str, ...]:
    """The mesh axes that split experts over several devices."""
    return tuple(axis for axis in sharding.axes("expert") if sharding.count(axis) > 1)


def _groups(sharding: Sharding) -> tuple[str, ...]:
    """The mesh axes that split the tokens that meet the same experts."""
    owners = sharding.axes("expert")
    return tuple(axis for axis in sharding.axes("b") if axis not in owners)


def _communication(num_tokens: int, experts_per_token: int, sharding: Sharding) -> str:
    if sharding.communication != "auto":
        return sharding.communication
    in_group = -(-num_tokens // sharding.count(*_groups(sharding)))
    num_devices = sharding.count(*sharding.axes("expert"))
    return choose_communication(in_group, num_devices, experts_per_token)


class _OnDevice(NamedTuple):
    """What a device does, with how many experts, and the mesh axes that the experts lie on."""

    compute: Compute
    num_experts: int
    owners: tuple[str, ...]

    def __call__(
        self,
        experts: Any,
        rows: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        per_row: tuple[jax.Array, ...] | None,
    ) -> jax.Array:
        """Rows [s, d], ids among all experts, weights [s, k] -> what this device's experts add."""
        pairs = ("s", "top_expert")
        first = lax.axis_index(self.owners) * self.num_experts
        routing = own_pairs(
            Routing(Tagged(ids, pairs), Tagged(weights, pairs)), first, self.num_experts
        )
        own = OwnRows(Tagged(rows, ("s", "d")), routing, first, per_row)
        return self.compute(experts, own, self.num_experts).untag("s", "d")


def _summed(
    device: _OnDevice,
    experts: Any,
    rows: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    per_row: tuple[jax.Array, ...],
) -> jax.Array:
    """Every device of `owners` has the same rows [s, d]; what its experts add is summed."""
    added = device(experts, rows, ids, weights, per_row).astype(accumulator(rows.dtype))
    return lax.psum(added, device.owners).astype(rows.dtype)


def _exchanged(
    device: _OnDevice,
    experts: Any,
    rows: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    per_row: tuple[jax.Array, ...],
) -> jax.Array:
    """Every device has rows of its own [s, d], which it sends to where their experts are."""
    del per_row  # stays where the rows come from
    num_devices = lax.axis_size(device.owners)
    num_tokens, experts_per_token = ids.shape
    room = capacity(num_tokens, num_devices, experts_per_token)
    queues = _line_up(ids, device.num_experts, num_devices)
    pairs = _side_by_side(ids, weights, device.num_experts * num_devices)
    swap = functools.partial(
        lax.all_to_all, axis_name=device.owners, split_axis=0, concat_axis=0, tiled=True
    )

    def one_round(number: jax.Array | int) -> jax.Array:
        """What comes of the `number`-th `room` tokens of each queue, float [s, d]."""
        slot = queues.place - number * room
        now = queues.first & (slot >= 0) & (slot < room)
        token = jnp.full((num_devices, room), num_tokens, jnp.int32)
        token = token.at[jnp.where(now, queues.owner, num_devices), jnp.where(now, slot, room)].set(
            lax.broadcasted_iota(jnp.int32, ids.shape, 0), mode="drop"
        )
        received, routing = (
            swap(array.at[token].get(mode="fill", fill_value=0)).reshape(-1, array.shape[1])
            for array in (rows, pairs)
        )
        own_ids, own_weights = _taken_apart(routing, weights.dtype)
        y = device(experts, received, own_ids, own_weights, None)
        back = swap(y.reshape(num_devices, room, -1))
        picked = back.at[queues.owner, slot].get(mode="clip")
        wide = picked.astype(accumulator(rows.dtype))
        return jnp.where(now[:, :, None], wide, 0).sum(1)

    total = one_round(0)
    most = -(-num_tokens // room)
    if most > 1:
        longest = lax.pmax(queues.lengths.max(), _varying(queues.lengths))
        total = _further_rounds(one_round, total, -(-longest // room), most)
    return total.astype(rows.dtype)


def _side_by_side(ids: jax.Array, weights: jax.Array, num_experts: int) -> jax.Array:
    """ids [s, k] and weights [s, k] as one array of floats [s, 2 k], which travels at once.

    Not the bits of one in the other's dtype, which would cut the gradient of the weights off:
    numbers up to 2^24 are exact in float32. 0 stands for no expert, so that rows of zeros have
    none.
    """
    number = jnp.where((ids >= 0) & (ids < num_experts), ids + 1, 0)
    wide = accumulator(weights.dtype)
    return jnp.concatenate([weights.astype(wide), number.astype(wide)], axis=1)


def _taken_apart(pairs: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The ids, -1 for none, and the weights that `_side_by_side` took."""
    weights, number = jnp.split(pairs, 2, axis=1)
    return number.astype(jnp.int32) - 1, weights.astype(dtype)


class _Queues(NamedTuple):
    """Who waits for which device, in the order of tokens.

    Attributes:
        owner: int32 [s, k], the device that has the pair's expert; a number past all if none has.
        first: bool [s, k], whether no earlier pair of the token has the same owner, if any.
        place: int32 [s, k], how many tokens wait for the owner before this one.
        lengths: int32 [devices], how many tokens wait for each.
    """

    owner: jax.Array
    first: jax.Array
    place: jax.Array
    lengths: jax.Array


def _line_up(ids: jax.Array, num_local: int, num_devices: int) -> _Queues:
    valid = (ids >= 0) & (ids < num_local * num_devices)
    owner = jnp.where(valid, ids // num_local, num_devices)
    k = ids.shape[1]
    earlier = jnp.tril(jnp.ones((k, k), bool), -1)
    repeated = ((owner[:, :, None] == owner[:, None, :]) & earlier[None]).any(2)
    waits = jax.nn.one_hot(owner, num_devices, dtype=jnp.bool_).any(1)
    before = jnp.cumsum(waits, axis=0, dtype=jnp.int32) - waits.astype(jnp.int32)
    place = jnp.take_along_axis(before, jnp.minimum(owner, num_devices - 1), axis=1)
    return _Queues(owner, valid & ~repeated, place, waits.sum(0, dtype=jnp.int32))


def _further_rounds(
    one_round: Callable[[jax.Array], jax.Array], total: jax.Array, rounds: jax.Array, most: int
) -> jax.Array:
    """Adds the rounds from the second on; all devices agree on how many there are.

    A loop over the most there can be, which skips those not needed, has gradients. Recomputing
    keeps what skipped rounds would remember out of memory.
    """

    def step(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        more = jax.checkpoint(one_round)
        return lax.cond(number < rounds, lambda: total + more(number), lambda: total), None

    def rest() -> jax.Array:
        return lax.scan(step, total, jnp.arange(1, most, dtype=jnp.int32))[0]

    return lax.cond(rounds > 1, rest, lambda: total)


def _varying(array: jax.Array) -> tuple[str, ...]:
    return tuple(sorted(jax.typeof(array).manual_axis_type.varying))


def _filled_up(array: jax.Array, multiple: int, fill: int) -> jax.Array:
    """[s, ...] with rows of `fill` added until they divide."""
    missing = -array.shape[0] % multiple
    if not missing:
        return array
    widths = ((0, missing), *((0, 0) for _ in array.shape[1:]))
    return jnp.pad(array, widths, constant_values=fill)


def _expert_specs(experts: Any, rules: Rules) -> Any:
    """The PartitionSpecs of the experts' arrays, which only the `expert` axis splits here."""

    def one(leaf: Any) -> Any:
        if is_tagged(leaf):
            return Tagged(leaf.spec(rules), leaf.axes)
        return PartitionSpec(rules["expert"])

    return jax.tree.map(one, experts, is_leaf=is_tagged)

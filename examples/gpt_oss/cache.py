"""Keys and values of the positions seen so far.

A full layer holds `context` positions, position p in slot p. A sliding layer never looks further
back than its window, so it holds a ring of `window` slots, position p in slot p mod window. Both
answer the same call: `extend` takes the keys and values of new tokens and returns all that the new
tokens may attend to, with the position of each, and the cache that the next call needs.

In a ring the newest keys overwrite keys that the first tokens of the same chunk still see. So a
chunk attends to the ring as it was and to itself, side by side, and is written afterwards.

Rows of a batch may have different lengths: row i's new tokens stand at `start[i]`, the first
`count[i]` of them are real, the rest is padding on the right, which is never written.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_oss.config import GptOssConfig
from moe_jax.kernels.attention import EMPTY
from moe_jax.tagged import Tagged, tag


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """Where new tokens stand.

    Attributes:
        start: int32 {b}, position of each row's first new token.
        count: int32 {b}, how many of a row's new tokens are real.
    """

    start: Tagged
    count: Tagged

    def positions(self, size: int) -> Tagged:
        """Positions int32 {b, s} of `size` new tokens, padding included."""
        first = self.start.untag("b")[:, None]
        return tag(first + jnp.arange(size, dtype=jnp.int32)[None, :], "b", "s")

    def piece(self, first: int, size: int) -> "Span":
        """Where `size` of the new tokens stand, from the one with the index `first` on."""
        before = self.count.map(lambda n: jnp.minimum(n, first))
        count = self.count.map(lambda n: jnp.clip(n - first, 0, size))
        return Span(self.start + before, count)

    def real(self, size: int) -> Tagged:
        """Which of `size` new tokens are real: bool {b, s}."""
        count = self.count.untag("b")[:, None]
        return tag(jnp.arange(size, dtype=jnp.int32)[None, :] < count, "b", "s")


class Seen(NamedTuple):
    """What new tokens may attend to.

    Attributes:
        keys: {b, kv, k, hd}.
        values: {b, kv, k, hd}.
        positions: int32 {b, k}; `EMPTY` where there is no key.
    """

    keys: Tagged
    values: Tagged
    positions: Tagged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullCache:
    """Position p lies in slot p.

    Attributes:
        keys: {b, kv, k=context, hd}.
        values: {b, kv, k=context, hd}.
    """

    keys: Tagged
    values: Tagged

    def extend(
        self, keys: Tagged, values: Tagged, span: Span, reach: int | None
    ) -> "tuple[Seen, FullCache]":
        """Adds new keys and values {b, kv, k, hd}.

        With `reach`, only slots below it are returned; no row may then pass it.
        """
        slots, size = self.keys.size("k"), keys.size("k")
        target = jnp.where(span.real(size).array, span.positions(size).array, slots)
        cache = FullCache(_write(self.keys, keys, target), _write(self.values, values, target))
        reach = slots if reach is None else min(reach, slots)
        slot = jnp.arange(reach, dtype=jnp.int32)[None, :]
        end = (span.start + span.count).untag("b")[:, None]
        positions = tag(jnp.where(slot < end, slot, EMPTY), "b", "k")
        return Seen(_first(cache.keys, reach), _first(cache.values, reach), positions), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """Position p lies in slot p mod window.

    Attributes:
        keys: {b, kv, k=window, hd}.
        values: {b, kv, k=window, hd}.
    """

    keys: Tagged
    values: Tagged

    def extend(
        self, keys: Tagged, values: Tagged, span: Span, reach: int | None
    ) -> "tuple[Seen, RingCache]":
        """Adds new keys and values {b, kv, k, hd}; `reach` changes nothing."""
        del reach
        slots, size = self.keys.size("k"), keys.size("k")
        new, real = span.positions(size).array, span.real(size).array
        index = jnp.arange(size, dtype=jnp.int32)[None, :]
        # Only the last of the positions that share a slot is written: the order of writes to one
        # slot is not defined.
        kept = real & (index >= span.count.untag("b")[:, None] - slots)
        target = jnp.where(kept, new % slots, slots)
        cache = RingCache(_write(self.keys, keys, target), _write(self.values, values, target))
        if size == 1:
            end = span.start + span.count
            return Seen(cache.keys, cache.values, _ring_positions(end, slots)), cache
        held = _ring_positions(span.start, slots).array
        positions = jnp.concatenate([held, jnp.where(real, new, EMPTY)], axis=1)
        seen = Seen(
            _joined(self.keys, keys), _joined(self.values, values), tag(positions, "b", "k")
        )
        return seen, cache


type LayerCache = FullCache | RingCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The caches of all layers and how many tokens each row holds.

    Attributes:
        layers: one for each block.
        lengths: int32 {b}.
    """

    layers: tuple[LayerCache, ...]
    lengths: Tagged

    @classmethod
    def empty(cls, config: GptOssConfig, batch: int, context: int, dtype: Any) -> "Cache":
        """A cache for `batch` rows of up to `context` tokens; sliding layers hold their window.

        Raises:
            ValueError: a size is below 1, or `context` passes the model's longest sequence.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= context <= config.max_position_embeddings:
            raise ValueError(
                f"context must be between 1 and the model's longest sequence "
                f"{config.max_position_embeddings}, got {context}"
            )

        def layer(index: int) -> LayerCache:
            window = config.window(index)
            kind, slots = (
                (FullCache, context) if window is None else (RingCache, min(window, context))
            )
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            # Two arrays, not one twice: they are donated.
            return kind(*(tag(jnp.zeros(shape, dtype), "b", "kv", "k", "hd") for _ in range(2)))

        layers = tuple(layer(index) for index in range(config.num_hidden_layers))
        return cls(layers, tag(jnp.zeros(batch, jnp.int32), "b"))


def _ring_positions(length: Tagged, slots: int) -> Tagged:
    """The position in each slot of a ring that has seen `length` {b} tokens: int32 {b, k}."""
    last = length.untag("b")[:, None] - 1
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    positions = last - (last - slot) % slots
    return tag(jnp.where(positions < 0, EMPTY, positions), "b", "k")


def _write(buffer: Tagged, new: Tagged, target: jax.Array) -> Tagged:
    """Writes new {b, kv, k, hd} to slots `target` [b, k]; slots past the end are left out."""
    written = jax.vmap(
        # a row at a time, so that rows of several devices stay where they are
        lambda held, added, slot: held.at[:, slot].set(added, mode="drop")
    )(
        buffer.untag("b", "kv", "k", "hd"),
        new.untag("b", "kv", "k", "hd").astype(buffer.dtype),
        target,
    )
    return tag(written, "b", "kv", "k", "hd")


def _first(x: Tagged, count: int) -> Tagged:
    return tag(x.untag("b", "kv", "k", "hd")[:, :, :count], "b", "kv", "k", "hd")


def _joined(held: Tagged, new: Tagged) -> Tagged:
    arrays = held.untag("b", "kv", "k", "hd"), new.untag("b", "kv", "k", "hd")
    return tag(
        jnp.concatenate([arrays[0], arrays[1].astype(held.dtype)], axis=2), "b", "kv", "k", "hd"
    )

"""Attention, defined in XLA.

Scores and softmax are float32. They are the largest arrays of a long prompt, so queries are taken
in blocks where all scores at once would pass `SCORE_BUDGET`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.tagged import Tagged, tag

EMPTY = -1
"""The position of a key slot that holds nothing."""

SCORE_BUDGET = 2**28
"""Most scores (4 bytes each) that are held at once."""


def visible(q_positions: Tagged, k_positions: Tagged, window: int | None) -> Tagged:
    """Which keys a query sees: bool {b, q, k}.

    A query sees keys at its own position and before, the last `window` of them where there is one.

    Args:
        q_positions: int32 {b, q}.
        k_positions: int32 {b, k}; `EMPTY` where there is no key.
        window: keys a query sees at most, its own included, or None.
    """
    q = q_positions.untag("b", "q")[:, :, None]
    k = k_positions.untag("b", "k")[:, None, :]
    mask = (k >= 0) & (k <= q)
    if window is not None:
        mask &= k > q - window
    return tag(mask, "b", "q", "k")


def attend(
    queries: Tagged,
    keys: Tagged,
    values: Tagged,
    sinks: Tagged,
    q_positions: Tagged,
    k_positions: Tagged,
    window: int | None,
) -> Tagged:
    """See `api.attend`."""
    count, per_query = queries.size("q"), queries.size("b") * queries.size("h") * keys.size("k")
    block = max(1, SCORE_BUDGET // max(1, per_query))
    if count <= block:
        return _attend_block(queries, keys, values, sinks, q_positions, k_positions, window)
    q, p = (_in_blocks(x, block) for x in (queries.order("b", "q", "h", "hd"), q_positions))

    @jax.checkpoint
    def one(index: jax.Array) -> jax.Array:
        here = q.take(index, "blocks"), p.take(index, "blocks")
        out = _attend_block(here[0], keys, values, sinks, here[1], k_positions, window)
        return out.untag("b", "q", "h", "hd")

    out = tag(lax.map(one, jnp.arange(q.size("blocks"))), "blocks", "b", "q", "h", "hd")
    out = out.merge(("blocks", "q"), "q")
    first = lax.slice_in_dim(out.array, 0, count, axis=out.position("q"))
    return tag(first, *out.axes).order(*queries.axes)


def _attend_block(
    queries: Tagged,
    keys: Tagged,
    values: Tagged,
    sinks: Tagged,
    q_positions: Tagged,
    k_positions: Tagged,
    window: int | None,
) -> Tagged:
    """`attend` with all scores in memory at once."""
    kv = keys.size("kv")
    q = queries.split("h", kv=kv, group=-1)
    sink = sinks.astype(jnp.float32).split("h", kv=kv, group=-1)
    highest = lax.Precision.HIGHEST
    scores = q.dot(keys, "hd", preferred_element_type=jnp.float32, precision=highest)
    scores = scores.order("b", "kv", "group", "q", "k") * queries.size("hd") ** -0.5
    mask = visible(q_positions, k_positions, window).expand_to(scores)
    logits = jnp.where(mask, scores.array, -jnp.inf)
    floor = sink.array[None, :, :, None, None]
    largest = lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), floor))
    weights = jnp.exp(logits - largest)
    total = weights.sum(-1, keepdims=True) + jnp.exp(floor - largest)
    out = tag(weights.astype(values.dtype), *scores.axes).dot(
        values, "k", preferred_element_type=jnp.float32, precision=highest
    )
    out = out.map(lambda array: array / total).merge(("kv", "group"), "h")
    return out.order(*queries.axes).astype(queries.dtype)


def _in_blocks(x: Tagged, block: int) -> Tagged:
    """Splits queries {q} into {blocks, q=block}, filled up at the end."""
    place = x.position("q")
    pad = [(0, 0)] * len(x.axes)
    pad[place] = (0, -x.size("q") % block)
    return tag(jnp.pad(x.array, pad), *x.axes).split("q", blocks=-1, q=block)

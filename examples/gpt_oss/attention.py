"""Grouped-query attention with sinks and sliding windows.

A sink is one logit a head that joins the softmax and is then dropped, so that a head can attend to
nothing. What a query may see is told by positions alone, never by where a key lies in memory: the
same function serves a whole prompt, a chunk of one, a single token, and rows of different length.

Scores and softmax are float32. They are the largest arrays of a long prompt, so queries are taken
in blocks where all scores at once would pass `SCORE_BUDGET`.

References:
    grouped queries, https://arxiv.org/abs/2305.13245
    sinks, https://arxiv.org/abs/2309.17453
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
    """Attention of queries over keys, by position.

    Args:
        queries: {b, q, h, hd}; head i reads key and value head i // (h / kv).
        keys: {b, kv, k, hd}.
        values: {b, kv, k, hd}.
        sinks: {h}.
        q_positions: int32 {b, q}.
        k_positions: int32 {b, k}; `EMPTY` where there is no key.
        window: see `visible`.

    Returns:
        {b, q, h, hd} with the dtype of `queries`. A query that sees no key gets zeros.
    """
    count, per_query = queries.size("q"), queries.size("b") * queries.size("h") * keys.size("k")
    block = max(1, SCORE_BUDGET // per_query)
    if count <= block:
        return _attend_block(queries, keys, values, sinks, q_positions, k_positions, window)
    q, p = (_in_blocks(x, "q", block) for x in (queries.order("b", "q", "h", "hd"), q_positions))

    @jax.checkpoint
    def one(index: jax.Array) -> jax.Array:
        here = q.take(index, "blocks"), p.take(index, "blocks")
        out = _attend_block(here[0], keys, values, sinks, here[1], k_positions, window)
        return out.untag("b", "q", "h", "hd")

    out = tag(lax.map(one, jnp.arange(q.size("blocks"))), "blocks", "b", "q", "h", "hd")
    return _front(out.merge(("blocks", "q"), "q"), "q", count).order(*queries.axes)


def attend_causally(
    queries: Tagged, keys: Tagged, values: Tagged, sinks: Tagged, window: int | None
) -> Tagged:
    """Attention of a sequence over itself, from position 0.

    With a window the sequence is cut into pieces of its length. A query then only meets the keys of
    its own piece and of the one before, and cost and memory grow with the length, not its square.

    Args:
        queries: {b, q, h, hd}.
        keys: {b, kv, k, hd} of the same positions.
        values: {b, kv, k, hd}.
        sinks: {h}.
        window: see `visible`.

    Returns:
        {b, q, h, hd} with the dtype of `queries`.
    """
    batch, length = queries.size("b"), queries.size("q")
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    q_at, k_at = tag(positions, "b", "q"), tag(positions, "b", "k")
    if window is None or length <= 2 * window:
        return attend(queries, keys, values, sinks, q_at, k_at, window)
    order = queries.axes
    pieces = _in_blocks(queries.order("b", "q", "h", "hd"), "q", window)
    q_at = _in_blocks(q_at, "q", window)
    keys, values = (
        _with_previous(_in_blocks(x.order("b", "kv", "k", "hd"), "k", window), 0)
        for x in (keys, values)
    )
    k_at = _with_previous(_in_blocks(k_at, "k", window, fill=EMPTY), EMPTY)
    pieces, keys, values, q_at, k_at = (
        x.merge(("b", "blocks"), "b") for x in (pieces, keys, values, q_at, k_at)
    )
    out = attend(pieces, keys, values, sinks, q_at, k_at, window)
    out = out.split("b", b=batch, blocks=-1).merge(("blocks", "q"), "q")
    return _front(out, "q", length).order(*order)


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


def _in_blocks(x: Tagged, axis: str, block: int, fill: int = 0) -> Tagged:
    """Splits an axis into {blocks, axis=block}, filled up at its end."""
    place, size = x.position(axis), x.size(axis)
    pad = [(0, 0)] * len(x.axes)
    pad[place] = (0, -size % block)
    padded = tag(jnp.pad(x.array, pad, constant_values=fill), *x.axes)
    return padded.split(axis, **{"blocks": -1, axis: block})


def _with_previous(x: Tagged, fill: int) -> Tagged:
    """{..., blocks, k} -> {..., blocks, 2k}: each block with the one before it in front."""
    blocks, k = x.position("blocks"), x.position("k")
    pad = [(0, 0)] * len(x.axes)
    pad[blocks] = (1, 0)
    shifted = jnp.pad(x.array, pad, constant_values=fill)
    previous = lax.slice_in_dim(shifted, 0, x.size("blocks"), axis=blocks)
    return tag(jnp.concatenate([previous, x.array], axis=k), *x.axes)


def _front(x: Tagged, axis: str, count: int) -> Tagged:
    return tag(lax.slice_in_dim(x.array, 0, count, axis=x.position(axis)), *x.axes)

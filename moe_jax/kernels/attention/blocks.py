"""How the attention kernel cuts queries and keys, and which keys each block of queries meets."""

import dataclasses

import jax
import jax.numpy as jnp

_LEAST_ROWS = 16  # of a tensor core's matmul
_MOST_ROWS = 128
_MOST_ROWS_WITH_WINDOW = 64  # fewer keys are read that only some of the queries see
_MOST_SPLITS = 64
_PROGRAMS = 512
"""Programs that keep a GPU busy, where they are small; keys are split for as many."""

_LARGE_PROGRAMS = 256
"""The same of those with the most rows."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is cut.

    Attributes:
        queries: queries of a program, for all heads that read a key/value head.
        heads: those heads, filled up to a power of two.
        keys: keys of a step.
        features: of a head, filled up to a power of two.
        splits: programs that share the keys of a block of queries.
        num_warps: warps of a program.
        num_stages: steps whose keys are on their way at once.
        skips_masks: whether blocks of keys that all are seen have a loop of their own.
    """

    queries: int
    heads: int
    keys: int
    features: int
    splits: int
    num_warps: int
    num_stages: int
    skips_masks: bool


def choose_blocks(
    batch: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv: int,
    head_dim: int,
    window: int | None,
    capability: int,
) -> Blocks:
    """The blocks of a call, a pure function of its sizes and the GPU's compute capability."""
    heads = _power_of_two(num_heads // num_kv)
    features = max(_LEAST_ROWS, _power_of_two(head_dim))
    most = max(heads, _MOST_ROWS if window is None else _MOST_ROWS_WITH_WINDOW)
    rows = min(max(_power_of_two(num_queries) * heads, _LEAST_ROWS), most)
    queries, keys = rows // heads, 64
    steps = -(-num_keys // keys)
    programs = batch * num_kv * -(-num_queries // queries)
    wanted = _LARGE_PROGRAMS if rows == most else _PROGRAMS
    splits = max(1, min(wanted // programs, steps // 2, _MOST_SPLITS))
    large = rows == _MOST_ROWS and (capability < 90 or features > 64)
    return Blocks(
        queries,
        heads,
        keys,
        features,
        splits,
        num_warps=8 if large else 4,
        num_stages=3,
        skips_masks=window is None and rows == most and splits == 1,
    )


def block_ranges(
    q_positions: jax.Array, k_positions: jax.Array, window: int | None, blocks: Blocks
) -> jax.Array:
    """Which blocks of keys each block of queries meets.

    Args:
        q_positions: int32 [b, q].
        k_positions: int32 [b, k]; negative where there is no key.
        window: keys a query sees at most, or None.
        blocks: how both are cut.

    Returns:
        int32 [b, blocks of queries, 3]: the first block that may hold a key that is seen; up to
        which from there on all queries see all keys; and the end of those that may hold one.
    """
    least, most = jnp.iinfo(jnp.int32).min // 2, jnp.iinfo(jnp.int32).max // 2
    q_low = _cut(q_positions, blocks.queries, most).min(-1)[:, :, None]
    q_high = _cut(q_positions, blocks.queries, least).max(-1)[:, :, None]
    keys = _cut(k_positions, blocks.keys, -1)
    k_high = keys.max(-1)[:, None, :]
    k_low = jnp.where(keys < 0, most, keys).min(-1)[:, None, :]
    met = (k_low <= q_high) & (k_high >= 0)
    clear = (keys >= 0).all(-1)[:, None, :] & (k_high <= q_low)
    if window is not None:
        met &= k_high > q_low - window
        clear &= k_low > q_high - window
    place = jax.lax.broadcasted_iota(jnp.int32, met.shape, 2)
    last = jnp.where(met, place + 1, 0).max(-1, keepdims=True)
    first = jnp.where(met, place, last).min(-1, keepdims=True)
    clear_end = jnp.where(~clear & (place >= first), place, last).min(-1, keepdims=True)
    return jnp.concatenate([first, jnp.minimum(clear_end, last), last], -1).astype(jnp.int32)


def _cut(x: jax.Array, block: int, fill: int) -> jax.Array:
    """[b, n] -> [b, blocks, block], filled up at the end."""
    size = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, -size % block)), constant_values=fill)
    return padded.reshape(x.shape[0], -(-size // block), block)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

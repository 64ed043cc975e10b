"""The attention of gpt-oss, on the devices that have its heads and rows."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gpt_oss.cache import LayerCache, Span
from gpt_oss.config import GptOssConfig
from gpt_oss.layers import Linear
from gpt_oss.layout import Parameters
from gpt_oss.placement import constrained
from gpt_oss.rope import Angles, rotate
from moe_jax.kernels.attention import EMPTY
from moe_jax.kernels.attention import attend as attend_by_position
from moe_jax.sharding import Sharding
from moe_jax.tagged import Tagged, tag
from moe_jax.variables import param, value


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, sinks and, in sliding layers, a window.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: `Linear`, all with a bias.
        sinks: Param of {h}.
        window: keys a query sees, or None for all before it.
        head_dim: features of a head.
        sharding: the devices over which heads are spread, or None.
    """

    def __init__(
        self,
        config: GptOssConfig,
        parameters: Parameters,
        layer: int,
        sharding: Sharding | None = None,
    ) -> None:
        prefix = f"model.layers.{layer}.self_attn."

        def linear(name: str) -> Linear:
            stem = f"{prefix}{name}"
            return Linear(parameters(f"{stem}.weight"), parameters(f"{stem}.bias"))

        self.q_proj, self.k_proj = linear("q_proj"), linear("k_proj")
        self.v_proj, self.o_proj = linear("v_proj"), linear("o_proj")
        self.sinks = param(parameters(f"{prefix}sinks"))
        self.window = config.window(layer)
        self.head_dim = config.head_dim
        self.sharding = sharding

    def __call__(
        self,
        x: Tagged,
        angles: Angles,
        cache: LayerCache | None = None,
        span: Span | None = None,
        reach: int | None = None,
    ) -> tuple[Tagged, LayerCache | None]:
        """{b, s, d} -> {b, s, d} and the extended cache, if there was one."""
        q = self.q_proj(x, "d").split("h_hd", h=-1, hd=self.head_dim)
        k = self.k_proj(x, "d").split("kv_hd", kv=-1, hd=self.head_dim)
        v = self.v_proj(x, "d").split("kv_hd", kv=-1, hd=self.head_dim)
        q, k = rotate(q, angles).rename(s="q"), rotate(k, angles)
        k, v = (part.rename(s="k").order("b", "kv", "k", "hd") for part in (k, v))
        q, k, v = (constrained(part, self.sharding) for part in (q, k, v))
        sinks = value(self.sinks)
        if cache is None or span is None:
            out = attend_causally(q, k, v, sinks, self.window, self.sharding)
        else:
            seen, cache = cache.extend(k, v, span, reach)
            at = span.positions(q.size("q")).rename(s="q")
            where = at, seen.positions, self.window, self.sharding
            out = attend(q, seen.keys, seen.values, sinks, *where)
        out = out.rename(q="s").order("b", "s", "h", "hd").merge(("h", "hd"), "h_hd")
        out = constrained(out, self.sharding)
        return constrained(self.o_proj(out, "h_hd"), self.sharding), cache


def attend(
    queries: Tagged,
    keys: Tagged,
    values: Tagged,
    sinks: Tagged,
    q_positions: Tagged,
    k_positions: Tagged,
    window: int | None,
    sharding: Sharding | None = None,
) -> Tagged:
    """`moe_jax.kernels.attention.attend` on the devices of a sharding, if there is one.

    Each device has the heads and rows that its rules say, and needs no others.
    """
    operands = queries, keys, values, sinks, q_positions, k_positions
    compute = functools.partial(attend_by_position, window=window)
    if sharding is None:
        return compute(*operands)

    def local(*arrays: jax.Array) -> jax.Array:
        own = (tag(array, *x.axes) for array, x in zip(arrays, operands, strict=True))
        return compute(*own).array

    out = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=tuple(sharding.spec(x) for x in operands),
        out_specs=sharding.spec(queries),
    )(*(x.array for x in operands))
    return tag(out, *queries.axes)


def attend_causally(
    queries: Tagged,
    keys: Tagged,
    values: Tagged,
    sinks: Tagged,
    window: int | None,
    sharding: Sharding | None = None,
) -> Tagged:
    """Attention of a sequence over itself, from position 0.

    With a window the sequence is cut into pieces of its length. A query then only meets the keys of
    its own piece and of the one before, and cost and memory grow with the length, not its square.

    Args:
        queries: {b, q, h, hd}.
        keys: {b, kv, k, hd} of the same positions.
        values: {b, kv, k, hd}.
        sinks: {h}.
        window: keys a query sees at most, its own included, or None.
        sharding: see `attend`.

    Returns:
        {b, q, h, hd} with the dtype of `queries`.
    """
    batch, length = queries.size("b"), queries.size("q")
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    q_at, k_at = tag(positions, "b", "q"), tag(positions, "b", "k")
    if window is None or length <= 2 * window:
        return attend(queries, keys, values, sinks, q_at, k_at, window, sharding)
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
    out = attend(pieces, keys, values, sinks, q_at, k_at, window, sharding)
    out = out.split("b", b=batch, blocks=-1).merge(("blocks", "q"), "q")
    return _front(out, "q", length).order(*order)


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

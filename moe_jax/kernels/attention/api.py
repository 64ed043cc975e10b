"""Grouped-query attention with sinks and sliding windows.

A sink is one logit a head that joins the softmax and is then dropped, so that a head can attend to
nothing. What a query may see is told by positions alone, never by where a key lies in memory: the
same function serves a whole prompt, a chunk of one, a single token, and rows of different length.

Contract, for every backend: scores and softmax are float32, weights have the dtype of values where
they meet them.

References:
    grouped queries, https://arxiv.org/abs/2305.13245
    sinks, https://arxiv.org/abs/2309.17453
    scores that are never all there, https://arxiv.org/abs/2205.14135
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.attention import launch, reference
from moe_jax.kernels.lowering import check_implementation, no_gradient, per_platform, vary_together
from moe_jax.tagged import Tagged, tag

_QUERIES = "b", "q", "h", "hd"
_KEYS = "b", "kv", "k", "hd"
_AXES: dict[str, tuple[str, ...]] = {
    "queries": _QUERIES,
    "keys": _KEYS,
    "values": _KEYS,
    "sinks": ("h",),
    "q_positions": ("b", "q"),
    "k_positions": ("b", "k"),
}


def attend(
    queries: Tagged,
    keys: Tagged,
    values: Tagged,
    sinks: Tagged,
    q_positions: Tagged,
    k_positions: Tagged,
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Tagged:
    """Attention of queries over keys, by position.

    Args:
        queries: {b, q, h, hd}; head i reads key and value head i // (h / kv).
        keys: {b, kv, k, hd}, with the dtype of `queries`.
        values: {b, kv, k, hd}, likewise.
        sinks: {h}.
        q_positions: int32 {b, q}.
        k_positions: int32 {b, k}; `EMPTY` where there is no key.
        window: keys a query sees at most, its own included, or None.
        implementation: `xla`; `triton`, for NVIDIA GPUs; or None, which decides when the function
            is lowered, by the platform it is lowered for. The kernel takes bfloat16 and float16.

    Returns:
        {b, q, h, hd} with the dtype of `queries`. A query that sees no key gets zeros.

    Raises:
        ValueError: axes or sizes do not fit, or the implementation is unknown; on lowering, it is
            `triton` and the platform has no NVIDIA GPU.
        TypeError: a dtype is not supported.
        ImportError: on lowering, the implementation is `triton` and jax-triton is not installed.
    """
    check_implementation(implementation)
    operands = queries, keys, values, sinks, q_positions, k_positions
    _check(dict(zip(_AXES, operands, strict=True)), window)
    if implementation == "triton":
        _check_kernel(queries)
    arrays = [x.untag(*axes) for x, axes in zip(operands, _AXES.values(), strict=True)]
    out = _attend(vary_together(*arrays), window, implementation)
    return tag(out, *_QUERIES).order(*queries.axes)


def _in_xla(*arrays: jax.Array, window: int | None) -> jax.Array:
    operands = [tag(x, *axes) for x, axes in zip(arrays, _AXES.values(), strict=True)]
    return reference.attend(*operands, window=window).untag(*_QUERIES)


def _on_gpu(*arrays: jax.Array, window: int | None) -> jax.Array:
    attend = launch.attend if launch.fits(arrays[0], arrays[1]) else _in_xla
    return attend(*arrays, window=window)


_operation = per_platform("attend", _in_xla, _on_gpu, like=lambda q, *rest, window: q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(
    arrays: tuple[jax.Array, ...], window: int | None, implementation: str | None
) -> jax.Array:
    return _operation(*arrays, implementation=implementation, window=window)


def _forward(
    arrays: tuple[jax.Array, ...], window: int | None, implementation: str | None
) -> tuple[jax.Array, Any]:
    return _attend(arrays, window, implementation), arrays


def _backward(window: int | None, implementation: str | None, saved: Any, given: jax.Array) -> Any:
    del implementation  # gradients are those of the definition
    floats, positions = saved[:4], saved[4:]
    _, pull = jax.vjp(lambda *arrays: _in_xla(*arrays, *positions, window=window), *floats)
    return ((*pull(given), *map(no_gradient, positions)),)


_attend.defvjp(_forward, _backward)


def _check(operands: dict[str, Tagged], window: int | None) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for name, x in operands.items():
        if set(x.axes) != set(_AXES[name]):
            raise ValueError(f"{name} must have the axes {{{', '.join(_AXES[name])}}}, got {x}")
        for axis, size in x.sizes.items():
            known, where = sizes.setdefault(axis, (size, name))
            if size != known:
                raise ValueError(
                    f"axis {axis!r} has different sizes in {where}, {known}, and {name}, {size}"
                )
        wanted = jnp.integer if name.endswith("positions") else jnp.floating
        if not jnp.issubdtype(x.dtype, wanted):
            raise TypeError(f"{name} must be {wanted.__name__}, got {x.dtype}")
    heads, kv = sizes["h"][0], sizes["kv"][0]
    if not kv or heads % kv:
        raise ValueError(f"the query heads must be a multiple of the key heads, got {heads}, {kv}")
    dtypes = {name: str(operands[name].dtype) for name in ("queries", "keys", "values")}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"queries, keys and values must have one dtype, got {dtypes}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, got {window}")


def _check_kernel(queries: Tagged) -> None:
    if queries.dtype.name not in launch.DTYPES:
        raise TypeError(
            f"implementation='triton' takes {' and '.join(launch.DTYPES)}, got {queries.dtype}"
        )
    if queries.size("hd") > launch.MOST_FEATURES:
        raise ValueError(
            f"implementation='triton' takes heads of at most {launch.MOST_FEATURES} features, "
            f"got {queries.size('hd')}"
        )

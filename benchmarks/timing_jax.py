"""Times of compiled JAX functions, and the ceilings of the device they run on."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import gpu_state, sampler, summary


class Repeated:
    """A jitted function whose results are written over those of its last call.

    The last results are donated, so that buffers keep their addresses from call to call (a captured
    command buffer then stays valid) and any number of calls in flight needs the memory of one. They
    start out as NaN, or the largest integer: what the function leaves unwritten shows.

    Attributes:
        results: those of the last call.
        host_seconds: what one call of the last `run` took to issue.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.arguments = arguments
        self.results = jax.tree.map(_poison, jax.eval_shape(function, *arguments))
        self.host_seconds = 0.0
        self._step = jax.jit(
            lambda previous, *args: function(*args), donate_argnums=0, keep_unused=True
        )

    def call(self) -> Any:
        """One call, waited for."""
        self.results = jax.block_until_ready(self._step(self.results, *self.arguments))
        return self.results

    def run(self, count: int) -> float:
        """See `timing.Run`."""
        results, step, arguments = self.results, self._step, self.arguments
        start = time.perf_counter()
        for _ in range(count):
            results = step(results, *arguments)
        self.host_seconds = (time.perf_counter() - start) / count
        self.results = jax.block_until_ready(results)
        return time.perf_counter() - start


def _poison(like: jax.ShapeDtypeStruct) -> jax.Array:
    inexact = jnp.issubdtype(like.dtype, jnp.inexact)
    return jnp.full(like.shape, np.nan if inexact else jnp.iinfo(like.dtype).max, like.dtype)


def ceilings(num_bytes: int = 1 << 32, size: int = 8192) -> dict[str, float]:
    """What the device reaches on random data: reading and copying memory, and a bf16 matmul.

    Args:
        num_bytes: the array to read or to copy.
        size: the matmul is [size, size] x [size, size].

    Returns:
        `read_TBps`, `copy_TBps` (bytes read plus bytes written), `bf16_matmul_TFLOPs`.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    words = jax.jit(lambda key: jax.random.bits(key, (num_bytes // 4,), jnp.uint32))(keys[0])
    read = _median_seconds(Repeated(lambda x: x.sum(dtype=jnp.uint32), words))
    copy = _median_seconds(Repeated(lambda x: x ^ jnp.uint32(1), words))
    words.delete()
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[1:])
    matmul = _median_seconds(Repeated(jnp.dot, a, b))
    return {
        "read_TBps": num_bytes / read / 1e12,
        "copy_TBps": 2 * num_bytes / copy / 1e12,
        "bf16_matmul_TFLOPs": 2 * size**3 / matmul / 1e12,
    }


def _median_seconds(repeated: Repeated) -> float:
    return summary(sampler(repeated.run, 1)(15))["us"] / 1e6


def versions() -> dict[str, str]:
    """Versions of what takes part, and the environment that changes what XLA does."""
    found = {"python": platform.python_version()}
    for name in ("moe-jax", "jax", "jaxlib", "jax-triton", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = gpu_state().get("driver_version")
    if driver:
        found["driver"] = driver
    if os.environ.get("XLA_FLAGS"):
        found["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    return found

"""Parts of a sharded model alone: collectives, and one MoE layer in both forms of communication.

What is timed depends on itself: each collective, or layer, takes what the one before it returned.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from sharded_model import RandomWeights, compile_all
from timing import sampler, summary

import moe_jax
from gpt_oss.config import GptOssConfig
from moe_jax import GptOssMLP, Sharding
from moe_jax.sharding.communication import COMMUNICATIONS, Communication, capacity

KINDS = ("psum", "all_gather", "all_to_all")
_SETS = 2
_SUM_WIDTH = 2  # of float32, in which is summed, against bfloat16


class Chain:
    """A compiled function whose result is its next argument, over and over; see `timing.Run`."""

    def __init__(self, compiled: Any, x: jax.Array, *rest: Any) -> None:
        self._compiled, self._x, self._rest = compiled, x, rest

    def run(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            self._x = self._compiled(self._x, *self._rest)
        jax.block_until_ready(self._x)
        return time.perf_counter() - begin


def _times(chain: Chain, per_call: int, seconds: float) -> dict[str, float]:
    """Microseconds of one of `per_call`; five samples and the warming up take about `seconds`."""
    return summary(sampler(chain.run, per_call, warm_up=seconds / 4, sample=seconds / 8)(5))


def collectives(
    num_devices: int, tokens: list[int], width: int, dtype: Any, *, threads: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each collective and number of rows [tokens, width] in its array."""
    sharding = Sharding(moe_jax.make_mesh(devices=jax.devices()[:num_devices]))
    cases = [(kind, count) for kind in KINDS for count in tokens]
    found = [_collective(kind, count, width, dtype, sharding) for kind, count in cases]
    compiled = compile_all([lowered for lowered, _, _ in found], threads)
    for (kind, count), (_, x, repeats), program in zip(cases, found, compiled, strict=True):
        times = _times(Chain(program, x), repeats, seconds)
        rows = -(-count // num_devices) * num_devices
        size = rows * width * jnp.dtype(dtype).itemsize
        sent = size * (num_devices - 1) / num_devices * (2 if kind == "psum" else 1)
        yield {
            "mesh": {"data": 1, "expert": num_devices, "model": 1},
            "devices": num_devices,
            "phase": "collective",
            "collective": kind,
            "tokens": count,
            "bytes": size,
            **times,
            "sent_GBps": sent / times["us"] / 1e3,
        }


def _collective(
    kind: str, tokens: int, width: int, dtype: Any, sharding: Sharding
) -> tuple[Any, jax.Array, int]:
    """A lowered chain of one collective, what it begins with, and how often it is in the chain.

    Arrays are zeros, so that sums do not grow. Each device has the whole array of a sum or of an
    exchange, and its part of one that is gathered.
    """
    mesh, devices = sharding.mesh, sharding.mesh.size
    rows = -(-tokens // devices) * devices
    repeats = 32 if tokens <= 2048 else 4
    begins_with = rows // devices if kind == "all_gather" else rows

    def one(x: jax.Array) -> jax.Array:
        if kind == "psum":
            return lax.psum(x, "expert")
        if kind == "all_gather":
            whole = lax.optimization_barrier(lax.all_gather(x, "expert", tiled=True))
            return whole[: rows // devices]
        return lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(repeats):
            x = lax.optimization_barrier(one(x))
        return x

    spec = PartitionSpec("expert")
    mapped = jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    where = NamedSharding(mesh, spec)
    shape = begins_with * devices, width
    x = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()
    return jax.jit(mapped, out_shardings=where).lower(x), x, repeats


def layers(
    config: GptOssConfig,
    num_devices: int,
    tokens: list[int],
    dtype: Any,
    *,
    threads: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """A row for each form of communication and number of tokens; one form on one device.

    The experts of two layers take turns, each on the rows that the others returned, so that no
    cache helps. Rows begin and end where the form has them: on all devices for `psum`, split for
    `all_to_all`.
    """
    forms: tuple[Communication, ...] = COMMUNICATIONS if num_devices > 1 else ("psum",)
    mesh = moe_jax.make_mesh(devices=jax.devices()[:num_devices])
    experts = _experts(config, Sharding(mesh), dtype)
    cases: list[tuple[Communication, int]] = [(form, n) for n in tokens for form in forms]
    found = [
        _layer(config, Sharding(mesh, communication=form), experts, count, dtype)
        for form, count in cases
    ]
    compiled = compile_all([lowered for lowered, _ in found], threads)
    for (form, count), (_, args), program in zip(cases, found, compiled, strict=True):
        times = _times(Chain(program, *args), _turns(count), seconds)
        yield {
            "mesh": {"data": 1, "expert": num_devices, "model": 1},
            "devices": num_devices,
            "phase": "layer",
            "communication": form,
            "tokens": count,
            **times,
        }


def _experts(config: GptOssConfig, sharding: Sharding, dtype: Any) -> list[GptOssMLP]:
    get = RandomWeights(config, dtype, sharding if sharding.mesh.size > 1 else None)

    def one(layer: int) -> GptOssMLP:
        prefix = f"model.layers.{layer}.mlp.experts."
        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        return GptOssMLP(*(get(prefix + name) for name in names))

    return [one(layer) for layer in range(min(_SETS, config.num_hidden_layers))]


def _layer(
    config: GptOssConfig, sharding: Sharding, experts: list[GptOssMLP], tokens: int, dtype: Any
) -> tuple[Any, tuple[Any, ...]]:
    """A lowered chain of layers and its arguments: rows, experts, and a gating for each layer."""
    rng = np.random.default_rng(tokens)
    spread = sharding.communication == "all_to_all" and tokens % sharding.mesh.size == 0
    spec = PartitionSpec("expert") if spread else PartitionSpec()
    where = NamedSharding(sharding.mesh, spec)

    def rows(width: int) -> jax.Array:
        return jax.device_put(rng.standard_normal((tokens, width), np.float32).astype(dtype), where)

    def chain(x: jax.Array, experts: list[GptOssMLP], gatings: list[jax.Array]) -> jax.Array:
        for n, gating in enumerate(gatings):
            x = moe_jax.mixture_of_experts(
                experts[n % len(experts)],
                x,
                gating,
                experts_per_token=config.experts_per_token,
                sharding=sharding if sharding.mesh.size > 1 else None,
            )
            x = lax.with_sharding_constraint(x, where)
        return x

    args = (
        rows(config.hidden_size),
        experts,
        [rows(config.num_experts) for _ in range(_turns(tokens))],
    )
    return jax.jit(chain, out_shardings=where).lower(*args), args


def _turns(tokens: int) -> int:
    """How many layers one call has, so that it outlasts its launch."""
    return 4 if tokens <= 512 else _SETS


def start_rows(rows: list[Mapping[str, Any]], devices: int, chosen: int) -> tuple[float, float]:
    """What starting an exchange costs, in rows that are sent meanwhile, as the layers say.

    The choice goes by 4 (n - 1) / n rows a token for `psum`, which sums in float32, and 2 (n - 1)
    times the capacity for `all_to_all`, and this number. It is at least the first returned, at
    which the largest number of tokens with `psum` ahead is, and at most the second, of the least
    above it with `all_to_all` ahead; infinite where there is none.
    """
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["phase"] == "layer" and row["devices"] == devices:
            times.setdefault(row["tokens"], {})[row["communication"]] = row["us"]
    compared = {n: t for n, t in times.items() if len(t) == 2}
    slower = [n for n, t in compared.items() if t["all_to_all"] >= t["psum"]]
    last = max(slower, default=0)
    faster = [n for n in compared if n > last]
    saved = functools.partial(_rows_saved, devices=devices, chosen=chosen)
    return (saved(last) if last else 0.0), (saved(min(faster)) if faster else float("inf"))


def _rows_saved(tokens: int, *, devices: int, chosen: int) -> float:
    """How many rows fewer a device sends in an exchange than in a sum."""
    each = -(-tokens // devices)
    return 2 * (devices - 1) * (_SUM_WIDTH * tokens / devices - capacity(each, devices, chosen))

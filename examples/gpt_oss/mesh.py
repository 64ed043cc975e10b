"""The devices that a model is spread over: which meshes fit it, and which is best.

Attention is split by heads over the axis `model`. Experts and the vocabulary are split over
`expert` and `model` together, the batch over `data` and, outside of the experts, over `expert`.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from gpt_oss.config import GptOssConfig
from gpt_oss.errors import UserError
from gpt_oss.flags import MESH_AXES
from moe_jax.rules import FrozenRules, Rules, divisors, listed
from moe_jax.sharding import SHARDING_RULES, Sharding, make_mesh

RULES: Rules = FrozenRules(
    {
        **SHARDING_RULES,
        "voc": ("expert", "model"),
        **dict.fromkeys(("h", "kv", "h_hd", "kv_hd"), "model"),
    }
)
"""Those of the layer, and those of the vocabulary and of heads, alone or merged with their size."""


def choose_sizes(
    config: GptOssConfig, num_devices: int, parts: int | None = None
) -> dict[str, int]:
    """The sizes of the mesh axes for so many devices.

    Copies of the model are as many as can be, each over at least `parts` devices: one sequence is
    then as fast as on so few, and several share the copies. Attention is spread over as many of
    the devices of a copy as its key/value heads allow.

    Args:
        config: the shape.
        num_devices: how many there are.
        parts: how many devices a copy needs, see `needed_devices`; None for all.

    Raises:
        UserError: experts or vocabulary cannot be split so; says which numbers would do.
    """
    fitting = [sizes for sizes in _meshes(num_devices) if fault(config, sizes) is None]
    wanted = num_devices if parts is None else min(parts, num_devices)
    wide = [sizes for sizes in fitting if _parts(sizes) >= wanted]
    if wide:
        return min(wide, key=lambda sizes: (_parts(sizes), -sizes["model"]))
    best = max(fitting, key=lambda sizes: (_parts(sizes), sizes["model"]))
    counts = divisors(math.gcd(config.num_experts, config.vocab_size))
    raise UserError(
        f"{config.num_experts} experts and a vocabulary of {config.vocab_size} cannot be split "
        f"over {num_devices} devices: {listed(counts)} would do, or --mesh {describe(best)}, "
        f"which holds the model {best['data']} times"
    )


def needed_devices(num_bytes: int) -> int | None:
    """How many of this process's devices hold weights of so many bytes in half of their memory.

    The other half is for keys, values and what is computed. None where devices do not say how much
    memory they have, as CPUs, which share it.
    """
    found = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    limits = [limit for limit in found if limit]
    if len(limits) < len(found):
        return None
    return max(1, math.ceil(num_bytes / (min(limits) / 2)))


def fault(config: GptOssConfig, sizes: dict[str, int]) -> str | None:
    """Why a model cannot be spread so, or None if it can."""
    heads, model = config.num_key_value_heads, sizes["model"]
    if heads % model:
        return (
            f"mesh axis 'model' of size {model} does not divide {heads} key/value heads: "
            f"{listed(divisors(heads))} would do"
        )
    parts = sizes["expert"] * model
    for what, count in (("experts", config.num_experts), ("vocabulary", config.vocab_size)):
        if count % parts:
            size = math.gcd(config.num_experts, config.vocab_size)
            return (
                f"mesh axes 'expert' and 'model' of sizes {sizes['expert']} and {model} do not "
                f"divide the {what} of {count}: a product of {listed(divisors(size))} would do"
            )
    return None


def sharding_for(
    config: GptOssConfig,
    mesh: dict[str, int] | None = None,
    num_devices: int | None = None,
    parts: int | None = None,
) -> Sharding | None:
    """How to spread a model over a mesh, or over as many devices; None for neither.

    `parts` is that of `choose_sizes`.

    Raises:
        UserError: there are too few devices, or the model cannot be spread so.
    """
    if mesh is None and num_devices is None:
        return None
    if mesh is None:
        assert num_devices is not None
        mesh = choose_sizes(config, num_devices, parts)
    sizes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    needed, there = math.prod(sizes.values()), len(jax.devices())
    if needed > there:
        raise UserError(
            f"a mesh of {describe(sizes)} needs {needed} devices, there "
            f"{'is' if there == 1 else 'are'} {there}"
        )
    if needed < there and jax.process_count() > 1:
        raise UserError(
            f"a mesh of {describe(sizes)} leaves out some of the {there} devices of "
            f"{jax.process_count()} processes: use all, or start fewer"
        )
    found = fault(config, sizes)
    if found is not None:
        raise UserError(found)
    return Sharding(make_mesh(**sizes, devices=jax.devices()[:needed]), RULES)


def describe(sizes: Any) -> str:
    """Sizes of mesh axes as --mesh takes them."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _parts(sizes: dict[str, int]) -> int:
    """How many devices share a copy of the model."""
    return sizes["expert"] * sizes["model"]


def _meshes(num_devices: int) -> Iterator[dict[str, int]]:
    for data in divisors(num_devices):
        for model in divisors(num_devices // data):
            yield {"data": data, "expert": num_devices // data // model, "model": model}

"""The devices that a model is spread over: which meshes fit it, and which is best.

Attention is split by heads over the axis `model`. Experts and the vocabulary are split over
`expert` and `model` together, the batch over `data`. See `moe_jax.RULES`.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from gpt_oss.config import GptOssConfig
from gpt_oss.errors import UserError
from gpt_oss.flags import MESH_AXES
from gpt_oss.layout import parameter_specs
from gpt_oss.model import Parameters
from moe_jax.sharding import Sharding, make_mesh
from moe_jax.sharding.mesh import divisors


def choose_sizes(config: GptOssConfig, num_devices: int) -> dict[str, int]:
    """The sizes of the mesh axes for so many devices.

    Weights are spread as far as they can be, so that each device reads as little as possible, and
    attention over as many of the devices as its key/value heads allow.
    """
    fitting = [sizes for sizes in _meshes(num_devices) if fault(config, sizes) is None]
    return min(fitting, key=lambda sizes: (sizes["data"], -sizes["model"]))


def fault(config: GptOssConfig, sizes: dict[str, int]) -> str | None:
    """Why a model cannot be spread so, or None if it can."""
    heads, model = config.num_key_value_heads, sizes["model"]
    if heads % model:
        return (
            f"mesh axis 'model' of size {model} does not divide {heads} key/value heads: "
            f"{_listed(heads)} would do"
        )
    parts = sizes["expert"] * model
    for what, count in (("experts", config.num_experts), ("vocabulary", config.vocab_size)):
        if count % parts:
            size = math.gcd(config.num_experts, config.vocab_size)
            return (
                f"mesh axes 'expert' and 'model' of sizes {sizes['expert']} and {model} do not "
                f"divide the {what} of {count}: a product of {_listed(size)} would do"
            )
    return None


def sharding_for(
    config: GptOssConfig, mesh: dict[str, int] | None = None, num_devices: int | None = None
) -> Sharding | None:
    """How to spread a model over a mesh, or over as many devices; None for neither.

    Raises:
        UserError: there are too few devices, or the model cannot be spread so.
    """
    if mesh is None and num_devices is None:
        return None
    if mesh is None:
        assert num_devices is not None
        mesh = choose_sizes(config, num_devices)
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
    return Sharding(make_mesh(**sizes, devices=jax.devices()[:needed]))


def describe(sizes: Any) -> str:
    """Sizes of mesh axes as --mesh takes them."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def placed(parameters: Parameters, config: GptOssConfig, sharding: Sharding) -> Parameters:
    """`parameters`, put on the devices that they belong to."""
    specs = parameter_specs(config)

    def parameter(name: str) -> Any:
        value = parameters(name)
        whole = Sharding(sharding.mesh, {})
        return (whole if specs[name].is_whole else sharding).place(value)

    return parameter


def _meshes(num_devices: int) -> Iterator[dict[str, int]]:
    for data in divisors(num_devices):
        for model in divisors(num_devices // data):
            yield {"data": data, "expert": num_devices // data // model, "model": model}


def _listed(number: int) -> str:
    return ", ".join(map(str, divisors(number)))

"""Random parameters, for training from scratch and for tests of shape and speed."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt_oss.config import GptOssConfig
from gpt_oss.layout import ParameterSpec, parameter_specs
from moe_jax.tagged import Tagged, tag


def random_parameters(
    config: GptOssConfig, seed: int, dtype: Any = jnp.float32
) -> Callable[[str], Tagged]:
    """A function that gives each parameter by name, to build a `GptOss` from.

    A parameter depends on the seed and its name only.

    Args:
        config: the shape.
        seed: of all parameters.
        dtype: of all parameters.

    Returns:
        A function from a name to a `Tagged`; it raises KeyError for a name the model lacks.
    """
    specs = parameter_specs(config)

    def get(name: str) -> Tagged:
        spec = specs[name]
        return tag(_values(spec, config, seed).astype(dtype), *spec.axes)

    return get


def _values(spec: ParameterSpec, config: GptOssConfig, seed: int) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, jnp.float32)
    if spec.init == "ones":
        return jnp.ones(spec.shape, jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(spec.name.encode()))
    return config.initializer_range * jax.random.normal(key, spec.shape, jnp.float32)

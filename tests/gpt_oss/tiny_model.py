"""The tiny checkpoints of `tiny` as models, without files."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import tiny

from gpt_oss.config import GptOssConfig
from gpt_oss.layout import parameter_specs
from gpt_oss.model import GptOss
from moe_jax import BlockScaled, Sharding, Tagged, tag


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    """Float64 weights of configuration `name`, for the oracle."""
    tensors = tiny.tensors(name)
    return oracle.weights(
        {k: v.view(ml_dtypes.bfloat16) if v.dtype == np.uint16 else v for k, v in tensors.items()}
    )


def config(name: str) -> GptOssConfig:
    """The configuration `name`."""
    return GptOssConfig.from_dict(tiny.config(name))


def build(
    name: str,
    *,
    packed: bool = False,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    prepare: Callable[[Any], Any] = lambda weight: weight,
    **options: Any,
) -> GptOss:
    """The model of configuration `name`, its experts as MXFP4 if `packed`, else float32."""
    tensors, specs = tiny.tensors(name) if packed else {}, parameter_specs(config(name))

    def parameter(key: str) -> Tagged | BlockScaled:
        if f"{key}_blocks" in tensors:
            return BlockScaled(
                tag(jnp.asarray(tensors[f"{key}_blocks"]), "expert", "out", "block", "byte"),
                tag(jnp.asarray(tensors[f"{key}_scales"]), "expert", "out", "block"),
            )
        return tag(jnp.asarray(weights(name)[key].astype(np.float32)), *specs[key].axes)

    def placed(key: str) -> Any:
        if sharding is None:
            return parameter(key)
        where = Sharding(sharding.mesh, {}) if specs[key].is_whole else sharding
        return where.place(parameter(key))

    return GptOss(
        config(name), lambda key: prepare(placed(key)), dtype=dtype, sharding=sharding, **options
    )


def tokens(rows: list[list[int]]) -> Tagged:
    """Rows of ids as int32 {b, s}, filled up with zeros on the right."""
    array = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return tag(jnp.asarray(array), "b", "s")

"""Rotary positions, stretched by YaRN where the configuration says so.

The angle of a position is position x frequency. In float32 the product is off by up to 0.004 at
position 131,071, so it is never formed: a position is split into `high * 256 + low`, cosine and
sine of both parts come from small tables computed in float64, and the sum of angles is formed by
the addition theorem, which keeps the error at some 1e-7 for every position.

References:
    RoFormer, https://arxiv.org/abs/2104.09864
    YaRN, https://arxiv.org/abs/2309.00071
"""

import math

import jax.numpy as jnp
import numpy as np

from gpt_oss.config import GptOssConfig, YarnScaling
from moe_jax.tagged import Tagged, tag

type Angles = tuple[Tagged, Tagged]
"""Cosines and sines, see `cos_sin`."""

_LOW = 256


def frequencies(config: GptOssConfig) -> np.ndarray:
    """Radians per position of each pair of features: float64 [head_dim / 2], fastest first."""
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    first, last = _ramp_ends(config.head_dim, config.rope_theta, scaling)
    pair = np.arange(config.head_dim // 2)
    stretched = np.clip((pair - first) / (last - first), 0.0, 1.0)
    return plain * (1.0 - stretched) + plain / scaling.factor * stretched


def _ramp_ends(head_dim: int, theta: float, scaling: YarnScaling) -> tuple[float, float]:
    """The pairs between which frequencies go from kept to divided by the factor."""

    def pair(rotations: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        period = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last if last != first else last + 0.001


def cos_sin(config: GptOssConfig, positions: Tagged) -> tuple[Tagged, Tagged]:
    """Cosine and sine, float32 {..., pair}, of int32 positions {...}, times YaRN's factor.

    Positions must lie below `max_position_embeddings`.
    """
    step = frequencies(config)
    factor = config.rope_scaling.cosine_factor if config.rope_scaling else 1.0
    count = -(-config.max_position_embeddings // _LOW)
    low = np.arange(_LOW)[:, None] * step
    high = _LOW * np.arange(count)[:, None] * step
    row, column = positions.map(lambda p: p % _LOW), positions.map(lambda p: p // _LOW)
    cos_low, sin_low = _rows(np.cos(low), row), _rows(np.sin(low), row)
    cos_high, sin_high = _rows(factor * np.cos(high), column), _rows(factor * np.sin(high), column)
    return cos_high * cos_low - sin_high * sin_low, sin_high * cos_low + cos_high * sin_low


def rotate(x: Tagged, angles: tuple[Tagged, Tagged]) -> Tagged:
    """Turns x {..., hd} by the angles of `cos_sin`; feature i is paired with i + hd / 2.

    Computed in float32; the result has the dtype of x.
    """
    cos, sin = angles
    rest = tuple(axis for axis in x.axes if axis != "hd")
    halves = x.order(*rest, "hd").astype(jnp.float32).split("hd", half=2, pair=-1)
    first, second = halves.take(0, "half"), halves.take(1, "half")
    turned = first * cos - second * sin, second * cos + first * sin
    joined = jnp.concatenate([part.untag(*rest, "pair") for part in turned], axis=-1)
    return tag(joined, *rest, "hd").order(*x.axes).astype(x.dtype)


def _rows(table: np.ndarray, index: Tagged) -> Tagged:
    """The rows {...} of a table [row, pair]: float32 {..., pair}."""
    return tag(jnp.asarray(table, jnp.float32), "row", "pair").take(index, "row")

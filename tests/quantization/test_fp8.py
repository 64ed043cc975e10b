"""FP8 against ml_dtypes: every code, every halfway point, and scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax import tag
from moe_jax.quantization import fake_quantize_fp8
from moe_jax.quantization.fp8 import to_fp8

CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
MODES = {"eager": lambda f: f, "jit": jax.jit}


def edges():
    """Every number of the format, every halfway point with its neighbours, and what is outside."""
    numbers = np.sort(CODES[np.isfinite(CODES.astype(np.float32))].astype(np.float64))
    halfway = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    up, down = (np.nextafter(halfway, np.float32(s)) for s in (np.inf, -np.inf))
    outside = np.array([448.1, 463.9, 464, 480, 500, 1e30, np.inf, np.nan, 1e-30, 0], np.float32)
    return np.concatenate([numbers.astype(np.float32), halfway, up, down, outside, -outside])


def saturated(x):
    """The codes: ml_dtypes' own cast, of what is limited to the range first."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def same(got, expected):
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(got[known].view(np.uint32), expected[known].view(np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_cast_is_that_of_ml_dtypes_and_saturates(mode):
    x = edges()
    got = np.asarray(MODES[mode](to_fp8)(jnp.asarray(x))).astype(np.float32)
    same(got, saturated(x).astype(np.float32))
    assert np.isnan(np.float32(500).astype(ml_dtypes.float8_e4m3fn)), "a cast alone makes NaN"
    assert got[list(x).index(np.float32(500))] == 448


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [False, True], ids=["argument", "constant"])
@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 448, 6.5e-3, 3.0])
def test_one_scale_for_all(rng, scale, constant, mode):
    """Exact even where the scale is a constant, which XLA would turn into a reciprocal."""
    scale = np.float32(scale)
    x = np.concatenate([edges() * scale, rng.normal(size=20000).astype(np.float32) * 100 * scale])
    named = tag(jnp.asarray(x), "in")
    if constant:
        function = MODES[mode](lambda x: fake_quantize_fp8(x, tag(jnp.asarray(scale))))
        got = function(named)
    else:
        got = MODES[mode](fake_quantize_fp8)(named, tag(jnp.asarray(scale)))
    same(np.asarray(got.array), saturated(x / scale).astype(np.float32) * scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_scale_for_each_expert(rng, dtype):
    x = rng.normal(size=(5, 3, 7)).astype(dtype)
    scale = np.array([0.25, 3e-3, 1.7], np.float32)
    got = fake_quantize_fp8(tag(jnp.asarray(x), "s", "expert", "in"), tag(scale, "expert"))
    factor = scale[:, None]
    expected = saturated(x.astype(np.float32) / factor).astype(np.float32) * factor
    assert got.axes == ("s", "expert", "in") and got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got.array), expected.astype(dtype))


def test_gradient_passes_straight_through(rng):
    x = tag(jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), "s", "in")
    factors = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)

    def loss(x, scale):
        return (fake_quantize_fp8(x, scale).array * factors).sum()

    for transform in (jax.grad, jax.jacfwd):
        gradients = jax.jit(transform(loss, (0, 1)))(x, tag(jnp.float32(0.1)))
        np.testing.assert_array_equal(gradients[0].array, factors)
        assert jax.tree.leaves(gradients[1])[0] == 0


def test_refusals():
    x = tag(jnp.ones((2, 3)), "s", "in")
    with pytest.raises(TypeError, match="scale must be Tagged"):
        fake_quantize_fp8(x, jnp.float32(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="float32, bfloat16 and float16, not int32"):
        fake_quantize_fp8(x.astype(jnp.int32), tag(jnp.float32(1)))
    with pytest.raises(ValueError, match="has axes that x"):
        fake_quantize_fp8(x, tag(jnp.ones(2), "expert"))
    with pytest.raises(ValueError, match="different sizes"):
        fake_quantize_fp8(x, tag(jnp.ones(2), "in"))

"""Norms against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import f32

from moe_jax import Norm, tag


def normed(x, kind, eps):
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_values(rng, kind):
    x, weight, bias = rng.normal(size=(3, 7)) + 2, rng.normal(size=7), rng.normal(size=7)
    x = x.astype(np.float32)
    norm = Norm(kind, 0.25)
    y = norm(f32(x.T, "d", "s"), f32(weight, "d"), f32(bias, "d"))
    assert y.axes == ("d", "s")
    expected = normed(x, kind, 0.25) * weight + bias
    np.testing.assert_allclose(y.untag("s", "d"), expected, rtol=1e-5, atol=1e-6)
    y = norm(f32(x, "s", "in"), f32(weight, "in"), axis="in")
    np.testing.assert_allclose(y.array, normed(x, kind, 0.25) * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_axes_that_only_the_weight_has_come_in_front(rng, kind):
    x, weight = rng.normal(size=(3, 7)).astype(np.float32), rng.normal(size=(7, 2))
    y = Norm(kind)(f32(x, "s", "d"), f32(weight, "d", "expert"))
    assert y.axes == ("expert", "s", "d")
    expected = normed(x, kind, 1e-6) * weight.T[:, None]
    np.testing.assert_allclose(y.array, expected, rtol=1e-5, atol=1e-6)


def test_low_precision_rows_are_normalized_in_float32():
    x = tag(jnp.array([[300.0, 400.0]], jnp.float16), "s", "d")  # squares overflow
    y = Norm()(x, tag(jnp.ones(2, jnp.bfloat16), "d"))
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(y.array, np.float64), [[0.8485, 1.1314]], rtol=1e-3)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_rows_of_zeros_have_finite_gradients(kind):
    gradient = jax.grad(lambda x: Norm(kind)(tag(x, "s", "d"), f32(np.ones(3), "d")).array.sum())(
        jnp.zeros((2, 3))
    )
    assert np.isfinite(gradient).all()


def test_refuses():
    for arguments, message in [
        (("mean",), "kind of norm must be 'rms' or 'layer', got 'mean'"),
        (("rms", 0.0), "eps must be positive, got 0.0"),
        (("rms", float("nan")), "eps must be positive, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Norm(*arguments)
    x = f32(np.ones((2, 3)), "s", "d")
    with pytest.raises(ValueError, match="no axis 'd' among {in}"):
        Norm()(x, f32(np.ones(3), "in"))
    with pytest.raises(ValueError, match="axis 'd' has different sizes"):
        Norm()(x, f32(np.ones(4), "d"))

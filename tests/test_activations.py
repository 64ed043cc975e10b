"""Activations against NumPy float64, in every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import clamped_swiglu, f32, gelu, gelu_tanh, sigmoid

from moe_jax import GPT_OSS_ACTIVATION, Activation
from moe_jax.tagged import tag

PLAIN = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
GATES = {"geglu": gelu, "geglu_tanh": gelu_tanh, "reglu": PLAIN["relu"], "bilinear": lambda x: x}
LAYOUTS = {
    "interleaved": lambda x: (x[:, 0::2], x[:, 1::2]),
    "interleaved_up_first": lambda x: (x[:, 1::2], x[:, 0::2]),
    "concatenated": lambda x: (x[:, :5], x[:, 5:]),
    "concatenated_up_first": lambda x: (x[:, 5:], x[:, :5]),
}


@pytest.fixture
def x(rng) -> np.ndarray:
    return (4 * rng.normal(size=(3, 10))).astype(np.float32).astype(np.float64)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain(x, kind):
    y = Activation(kind)(f32(x, "s", "out"))
    assert y.axes == ("s", "out")
    close(y.array, PLAIN[kind](x))


def test_the_two_gelus_differ(x):
    erf, tanh = (Activation(kind)(f32(x, "s", "out")).array for kind in ("gelu", "gelu_tanh"))
    assert np.abs(erf - tanh).max() > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["swiglu", *GATES])
def test_gated_layouts(x, kind, layout):
    gate, up = LAYOUTS[layout](x)
    expected = clamped_swiglu(gate, up) if kind == "swiglu" else GATES[kind](gate) * up
    y = Activation(kind, layout=layout)(f32(x.T, "out", "s"))
    close(y.untag("s", "out"), expected)


def test_parameters_of_swiglu(x):
    gate, up = x[:, 0::2], x[:, 1::2]
    y = GPT_OSS_ACTIVATION(f32(x, "s", "out"))
    assert (np.abs(x) > 7).any()
    close(y.array, clamped_swiglu(gate, up, alpha=1.702, beta=1.0, limit=7.0))
    other = Activation("swiglu", alpha=0.5, beta=-0.25, limit=1.5, layout="interleaved")
    close(other(f32(x, "s", "out")).array, clamped_swiglu(gate, up, 0.5, -0.25, 1.5))


def test_limit_and_beta_of_geglu(x):
    gate, up = x[:, :5], x[:, 5:]
    expected = gelu(np.minimum(gate, 2)) * (np.clip(up, -2, 2) + 1)
    close(Activation("geglu", beta=1.0, limit=2.0)(f32(x, "s", "out")).array, expected)


def test_combine_goes_by_name(x):
    gate, up = x[:, :5], x[:, 5:]
    y = Activation("swiglu").combine(f32(gate, "s", "out"), f32(up.T, "out", "s"))
    close(y.array, clamped_swiglu(gate, up))


def test_bfloat16_stays_and_nan_shows():
    x = tag(jnp.array([[1.0, jnp.nan, 2.0, 1.0]], jnp.bfloat16), "s", "out")
    y = GPT_OSS_ACTIVATION(x)
    assert y.dtype == jnp.bfloat16 and bool(jnp.isnan(y.array[0, 0])) and y.array[0, 1] > 0


def test_the_clamp_has_no_gradient_outside():
    x = f32(np.array([[8.0, 9.0, 1.0, 2.0]]), "s", "out")
    gradient = jax.grad(lambda v: GPT_OSS_ACTIVATION(v).array.sum())(x).array
    assert gradient[0, 0] == 0 and gradient[0, 1] == 0 and (gradient[0, 2:] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "swish"}, "activation kind must be one of .* got 'swish'"),
        ({"layout": "packed"}, "activation layout must be one of .* got 'packed'"),
        ({"kind": "geglu", "alpha": 1.702}, "alpha belongs to swiglu, got alpha=1.702"),
        ({"kind": "relu", "beta": 1.0}, "beta and limit belong to gated kinds, got beta=1.0"),
        ({"kind": "gelu", "limit": 7.0}, "beta and limit belong to gated kinds"),
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
        ({"beta": float("inf")}, "beta must be finite, got inf"),
        ({"limit": 0.0}, "limit must be positive or None, got 0.0"),
        ({"limit": float("nan")}, "limit must be positive or None, got nan"),
    ],
)
def test_refuses(arguments, message, record_property):
    if "one of" in message:
        record_property("bad_input", "unknown activation")
    with pytest.raises(ValueError, match=message):
        Activation(**arguments)


def test_refuses_what_does_not_fit(record_property):
    record_property("bad_input", "fused width odd")
    with pytest.raises(ValueError, match="needs an even size of axis 'out', got 5"):
        Activation("swiglu")(f32(np.ones((2, 5)), "s", "out"))
    one = f32(np.ones((2, 4)), "s", "out")
    with pytest.raises(ValueError, match="'relu' has one lane"):
        Activation("relu").combine(one, one)
    with pytest.raises(ValueError, match="no axis 'out'"):
        Activation("swiglu")(one.rename(out="in"))

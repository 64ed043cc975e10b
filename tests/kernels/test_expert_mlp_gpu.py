"""The layer's kernels on an NVIDIA GPU, against float64: `JAX_PLATFORMS=cuda pytest <this file>`.

The tokens reach every regime of the table, the sizes loops of one step and of many.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_mlp_oracle import Layer

import moe_jax
from moe_jax import tag
from moe_jax.kernels.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")

EXPERTS, K = 5, 2
SIZES = [(64, 128), (192, 320), (256, 64), (704, 192), (96, 160)]
TOKENS = [1, 2, 3, 7, 12, 40, 90, 150, 280, 900]
ROUTINGS = ["uniform", "one_expert", "ties", "masked"]
TOLERANCE = 3e-3


@pytest.fixture(scope="module", params=SIZES, ids=str)
def layer(request) -> Layer:
    return Layer.random(np.random.default_rng(1), EXPERTS, *request.param)


def inputs(rng, layer: Layer, tokens: int, kind: str):
    x = jnp.asarray(rng.normal(size=(tokens, layer.hidden)), jnp.bfloat16)
    logits = rng.normal(size=(tokens, EXPERTS)).astype(np.float32)
    mask = np.ones(tokens, bool)
    if kind == "one_expert":
        logits[:, 1:] = -np.inf
    if kind == "ties":
        logits = np.round(logits)
    if kind == "masked":
        mask = rng.random(tokens) < 0.5
    return x, logits, mask


def distance(y: jax.Array, expected: np.ndarray) -> float:
    """The relative error in the Frobenius norm."""
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / max(
        np.linalg.norm(expected), 1e-30
    )


@jax.jit
def apply(experts, x, logits, mask):
    return moe_jax.mixture_of_experts(experts, x, logits, experts_per_token=K, token_mask=mask)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values(layer, rng, tokens, kind):
    x, logits, mask = inputs(rng, layer, tokens, kind)
    experts = layer.tiled()
    y, again = apply(experts, x, logits, mask), apply(experts, x, logits, mask)
    expected = layer.routed(np.asarray(x, np.float64), logits, K, mask)
    assert distance(y, expected) <= TOLERANCE
    assert (np.asarray(y)[~mask] == 0).all()
    np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(again).view(np.uint16))


def test_no_tokens(layer):
    y = apply(layer.tiled(), *map(jnp.asarray, inputs(np.random.default_rng(0), layer, 0, "ties")))
    assert y.shape == (0, layer.hidden)


@pytest.mark.parametrize("tokens", [3, 60, 400])
def test_ids_outside_the_experts_stand_for_none(layer, rng, tokens):
    x, _, _ = inputs(rng, layer, tokens, "uniform")
    ids = rng.integers(-2, EXPERTS + 2, (tokens, K)).astype(np.int32)
    weights = rng.random((tokens, K)).astype(np.float32)
    y = jax.jit(moe_jax.fused_experts)(x, ids, weights, layer.tiled())
    assert distance(y, layer(np.asarray(x, np.float64), ids, weights)) <= TOLERANCE


@pytest.mark.parametrize("tokens", [2, 30, 300])
def test_nan_and_infinity_stay_where_they_are(rng, tokens):
    layer = Layer.random(np.random.default_rng(2), EXPERTS, 192, 128)
    x, logits, mask = inputs(rng, layer, tokens, "uniform")
    clean = np.asarray(apply(layer.tiled(), x, logits, mask), np.float32)
    bad = np.asarray(x, np.float32)
    bad[1, 5], bad[0, 7] = np.nan, np.inf
    y = apply(layer.tiled(), jnp.asarray(bad, jnp.bfloat16), logits, mask)
    y = np.asarray(y, np.float32)
    assert np.isnan(y[1]).all() and not np.isfinite(y[0]).any()
    np.testing.assert_array_equal(y[2:], clean[2:])


def test_a_scale_that_is_nan_shows(rng):
    layer = Layer.random(np.random.default_rng(2), EXPERTS, 192, 128)
    scales = layer.down.scales.copy()
    scales[:, 3, 1] = 255
    layer = dataclasses.replace(layer, down=dataclasses.replace(layer.down, scales=scales))
    x, logits, mask = inputs(rng, layer, 20, "uniform")
    y = np.asarray(apply(layer.tiled(), x, logits, mask), np.float32)
    assert np.isnan(y[:, 3]).all() and np.isfinite(np.delete(y, 3, 1)).all()


@pytest.mark.parametrize("out", [24, 40, 384])
@pytest.mark.parametrize("sizes", [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 9, 0, 130, 3)], ids=str)
def test_grouped_matmul(rng, sizes, out):
    layer = Layer.random(np.random.default_rng(4), EXPERTS, out, 320)
    count = sum(sizes) + 4
    rows = jnp.asarray(rng.normal(size=(count, 320)), jnp.bfloat16)
    weight = moe_jax.prepare_experts(layer.down.ours())
    y = jax.jit(grouped_matmul)(
        tag(rows, "row", "in"), weight, tag(jnp.asarray(sizes, jnp.int32), "expert")
    ).array
    expected = np.zeros((count, out))
    owner = np.repeat(np.arange(EXPERTS), sizes)
    for row, expert in enumerate(owner):
        expected[row] = layer.down.values()[expert] @ np.asarray(rows[row], np.float64)
    assert distance(y, expected) <= TOLERANCE
    assert (np.asarray(y)[len(owner) :] == 0).all()


@pytest.mark.parametrize("tokens", [4, 100])
def test_gradients_are_those_of_the_definition(rng, tokens):
    layer = Layer.random(np.random.default_rng(5), EXPERTS, 192, 320)
    x, logits, mask = inputs(rng, layer, tokens, "uniform")

    def loss(x, logits, experts, algorithm):
        y = moe_jax.mixture_of_experts(
            experts, x, logits, experts_per_token=K, token_mask=mask, algorithm=algorithm
        )
        return (y.astype(jnp.float32) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
    of_kernels = gradient(x, logits, layer.tiled(), "auto")
    of_xla = gradient(x, logits, layer.ours(), "dense")
    for one, other in zip(of_kernels, of_xla, strict=True):
        assert distance(one, np.asarray(other, np.float64)) <= 2e-2

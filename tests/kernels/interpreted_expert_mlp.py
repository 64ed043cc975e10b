"""The portable kernels of the layer, interpreted; test_expert_mlp.py runs it."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from expert_mlp_oracle import Layer
from triton_tools import interpreted_call

import moe_jax
from moe_jax.kernels.dispatch import launch as dispatch
from moe_jax.kernels.expert_mlp import launch
from moe_jax.kernels.tiled_matmul import configs
from moe_jax.kernels.tiled_matmul import launch as matmul
from moe_jax.kernels.tiled_matmul.configs import Config, Plan, Regime

# NumPy warns where the kernels compute infinities and NaN that they then do not use
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = Config("dot", 64, ((4,), (16,)), num_warps=1, stages=2, tiles=1)
PLANS = {
    "sorted": Plan(True, SMALL, SMALL),
    "splits": Plan(True, SMALL, dataclasses.replace(SMALL, splits=3)),
    "pairs": Plan(False, SMALL, SMALL),
    "one_height": Plan(True, *2 * (dataclasses.replace(SMALL, outputs=32, heights=((8,),)),)),
}


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_call", interpreted_call)
        patch.setattr(dispatch, "_call", interpreted_call)
        patch.setattr(matmul, "cuda_capability", lambda: 80)
        yield


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    regimes = (Regime(math.inf, math.inf, PLANS[request.param]),)
    monkeypatch.setattr(matmul, "_regimes", lambda _: regimes)
    return PLANS[request.param]


EACH_KERNEL = pytest.mark.parametrize("plan", ["sorted", "pairs"], indirect=True)
SIZES = {"whole_tiles": (64, 192), "odd": (96, 80), "narrow": (32, 32)}


def layer(rng, sizes: str = "odd", **options) -> Layer:
    hidden, intermediate = SIZES[sizes]
    return Layer.random(rng, 5, hidden, -(-intermediate // 32) * 32, **options)


@pytest.mark.parametrize(
    ("sizes", "num_tokens"), [("whole_tiles", 0), ("whole_tiles", 13), ("odd", 13), ("narrow", 1)]
)
def test_layer(plan, sizes, num_tokens, rng):
    oracle = layer(rng, sizes)
    x = rng.normal(size=(num_tokens, oracle.hidden)).astype(np.float32)
    ids = rng.integers(-1, 6, (num_tokens, 2), dtype=np.int32)
    ids[num_tokens // 2 :, 0] = 2
    weights = rng.random((num_tokens, 2)).astype(np.float32)
    y = launch.layer(oracle.tiled(), jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights))
    np.testing.assert_allclose(y, oracle(x, ids, weights), rtol=2e-5, atol=2e-4)
    assert y.dtype == jnp.float32


def test_routed_layer(plan, rng):
    oracle = layer(rng)
    x = rng.normal(size=(17, oracle.hidden)).astype(np.float32)
    logits, mask = rng.normal(size=(17, 5)).astype(np.float32), rng.random(17) < 0.7
    y = launch.routed_layer(oracle.tiled(), *map(jnp.asarray, (x, logits, mask)), None, 2)
    np.testing.assert_allclose(y, oracle.routed(x, logits, 2, mask), rtol=2e-5, atol=2e-4)


@EACH_KERNEL
@pytest.mark.parametrize("limit", [None, 0.5])
def test_activation_is_data(plan, limit, rng):
    oracle = layer(rng, activation=moe_jax.Activation("swiglu", 1.3, 0.25, limit, "interleaved"))
    x = rng.normal(size=(9, oracle.hidden)).astype(np.float32)
    ids = rng.integers(0, 5, (9, 1), dtype=np.int32)
    y = launch.layer(oracle.tiled(), jnp.asarray(x), jnp.asarray(ids), jnp.ones((9, 1)))
    np.testing.assert_allclose(y, oracle(x, ids, np.ones((9, 1))), rtol=2e-5, atol=2e-4)


@EACH_KERNEL
def test_nan_stays_where_it_is(plan, rng):
    oracle = layer(rng)
    x = rng.normal(size=(13, oracle.hidden)).astype(np.float32)
    ids, weights = rng.integers(0, 5, (13, 2), dtype=np.int32), np.ones((13, 2), np.float32)
    expected = oracle(x, ids, weights)
    x[3, 7], weights[10, 1], ids[11] = np.nan, np.nan, 5
    expected[11] = 0
    y = np.asarray(launch.layer(oracle.tiled(), *map(jnp.asarray, (x, ids, weights))))
    np.testing.assert_array_equal(np.isnan(y).all(1), np.isin(np.arange(13), [3, 10]))
    good = ~np.isin(np.arange(13), [3, 10])
    np.testing.assert_allclose(y[good], expected[good], rtol=2e-5, atol=2e-4)


def test_every_scale(rng):
    """Scales from the least to the largest, in weights whose sums stay within float32."""
    oracle = layer(rng, "narrow")
    scales = rng.integers(0, 255, oracle.down.scales.shape, dtype=np.uint8)
    scales[:, :2] = [[0], [254]]
    oracle = dataclasses.replace(oracle, down=dataclasses.replace(oracle.down, scales=scales))
    rows = rng.normal(size=(40, 32)).astype(np.float32) * 2.0**-12
    sizes = np.array([9, 0, 20, 5, 6], np.int32)
    y = matmul.multiply_rows(jnp.asarray(rows), oracle.tiled().down, jnp.asarray(sizes))
    expert = np.repeat(np.arange(5), sizes)
    expected = np.einsum("roi,ri->ro", oracle.down.values()[expert], rows.astype(np.float64))
    # 2^-127 of an expert's largest weight, of 2^127 here, counts as nothing
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(y).all() and np.abs(expected).max() > 2.0**100


@pytest.mark.parametrize(
    "sizes", [[9, 0, 20, 5, 6], [0, 0, 0, 0, 0], [3, 0, 0, 0, 1], [0, 40, 0, 0, 0]]
)
def test_rows(sizes, rng):
    oracle = layer(rng, "whole_tiles")
    rows = rng.normal(size=(40, 192)).astype(np.float32)
    y = matmul.multiply_rows(jnp.asarray(rows), oracle.tiled().down, jnp.asarray(sizes, jnp.int32))
    expert = np.repeat(np.arange(5), sizes)
    expected = np.zeros((40, 64))
    expected[: len(expert)] = np.einsum(
        "roi,ri->ro", oracle.down.values()[expert], rows[: len(expert)]
    )
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-4)


def test_the_table_is_interpreted_as_it_stands(rng):
    """The largest tiles, without a plan of the test's own."""
    assert configs.PORTABLE[-1].plan.down.tokens == 128
    oracle = Layer.random(rng, 2, 64, 96)
    x, ids = rng.normal(size=(150, 64)).astype(np.float32), np.zeros((150, 1), np.int32)
    y = launch.layer(oracle.tiled(), jnp.asarray(x), jnp.asarray(ids), jnp.ones((150, 1)))
    np.testing.assert_allclose(y, oracle(x, ids, np.ones((150, 1))), rtol=2e-5, atol=2e-4)

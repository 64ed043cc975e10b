"""Router losses against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import f32, softmax

import moe_jax
from moe_jax import load_balance_loss, router_z_loss, tag


def balance_oracle(logits: np.ndarray, ids: np.ndarray) -> float:
    share = np.bincount(ids.reshape(-1), minlength=logits.shape[1]) / max(1, ids.size)
    return logits.shape[1] * float((share * softmax(logits).mean(0)).sum())


def z_oracle(logits: np.ndarray) -> float:
    return float(np.mean(np.log(np.exp(logits.astype(np.float64)).sum(1)) ** 2))


@pytest.fixture
def logits(rng) -> np.ndarray:
    return (2 * rng.normal(size=(11, 6))).astype(np.float32)


def balance(values, k=2, mask=None, axes=("s", "expert")):
    tagged = f32(values, *axes)
    return load_balance_loss(tagged, moe_jax.route(tagged, k), mask)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_values(logits, k):
    ids = np.argsort(-logits, 1)[:, :k]
    np.testing.assert_allclose(balance(logits, k), balance_oracle(logits, ids), rtol=1e-5)
    np.testing.assert_allclose(router_z_loss(f32(logits, "s", "expert")), z_oracle(logits), 1e-5)


def test_extremes():
    even = np.log(np.eye(4) * 96 + 1).astype(np.float32)
    np.testing.assert_allclose(balance(even, 1), 1.0, rtol=1e-6)
    collapsed = np.tile(np.array([50.0, 0, 0, 0], np.float32), (5, 1))
    np.testing.assert_allclose(balance(collapsed, 1), 4.0, rtol=1e-6)


def test_several_token_axes_and_other_orders(logits):
    shaped = logits[:10].reshape(2, 5, 6)
    expected = balance(logits[:10])
    np.testing.assert_allclose(balance(shaped, axes=("b", "s", "expert")), expected, rtol=1e-6)
    moved = f32(shaped.transpose(2, 0, 1), "expert", "b", "s")
    loss = load_balance_loss(moved, moe_jax.route(moved, 2))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(router_z_loss(moved), z_oracle(logits[:10]), rtol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, 1e9, np.nan, -np.inf, np.inf])
def test_masked_tokens_do_not_count_whatever_they_hold(logits, garbage):
    keep = np.arange(11) % 3 != 0
    spoiled = np.where(keep[:, None], logits, np.float32(garbage))
    mask = tag(jnp.asarray(keep), "s")

    def losses(values):
        routing = moe_jax.route(values, 2)
        return load_balance_loss(values, routing, mask) + router_z_loss(values, mask)

    loss, gradient = jax.value_and_grad(losses)(f32(spoiled, "s", "expert"))
    rest = logits[keep]
    expected = balance_oracle(rest, np.argsort(-rest, 1)[:, :2]) + z_oracle(rest)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient.array[~keep], 0)
    alone = jax.grad(lambda v: balance_only(v) + router_z_loss(v))(f32(rest, "s", "expert"))
    np.testing.assert_allclose(gradient.array[keep], alone.array, rtol=1e-5, atol=1e-7)


def balance_only(values):
    return load_balance_loss(values, moe_jax.route(values, 2))


def test_tokens_without_any_expert_do_not_count(logits):
    barred = np.vstack([logits, np.full((2, 6), -np.inf, np.float32)])
    np.testing.assert_allclose(balance(barred), balance(logits), rtol=1e-6)
    np.testing.assert_allclose(router_z_loss(f32(barred, "s", "expert")), z_oracle(logits), 1e-5)


def test_ids_outside_the_experts_are_no_pairs(logits):
    tagged = f32(logits, "s", "expert")
    ids = np.argsort(-logits, 1)[:, :2]
    ids[4:] = 6
    routing = moe_jax.Routing(tag(jnp.asarray(ids), "s", "top_expert"), tagged)
    share = np.bincount(ids[:4].reshape(-1), minlength=6) / 8
    expected = 6 * (share * softmax(logits).mean(0)).sum()
    np.testing.assert_allclose(load_balance_loss(tagged, routing), expected, rtol=1e-5)


def test_no_tokens():
    empty = np.zeros((0, 6), np.float32)
    assert balance(empty) == 0 and router_z_loss(f32(empty, "s", "expert")) == 0
    none = tag(jnp.zeros(3, bool), "s")
    assert balance(np.ones((3, 6)), mask=none) == 0
    assert router_z_loss(f32(np.ones((3, 6)), "s", "expert"), none) == 0


def test_gradients_against_finite_differences(logits):
    ids = np.argsort(-logits, 1)[:, :2]

    def oracle(values):
        return balance_oracle(values, ids) + z_oracle(values)

    wide = logits.astype(np.float64)
    expected = np.zeros(wide.shape)
    for index in np.ndindex(wide.shape):
        step = np.zeros(wide.shape)
        step[index] = 1e-6
        expected[index] = (oracle(wide + step) - oracle(wide - step)) / 2e-6
    ours = jax.grad(lambda v: balance_only(v) + router_z_loss(v))(f32(logits, "s", "expert"))
    np.testing.assert_allclose(ours.array, expected, rtol=1e-4, atol=1e-6)

"""Selection by one tensor and weights from another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, best, combine, f32, moe, ratio_for, scores_of

import moe_jax
from moe_jax import Router, tag

EXPERTS, HIDDEN, TOKENS, K = 6, 5, 9, 2
ROUTERS = {
    "as_they_are": Router(score="linear"),
    "divided_by_their_sum": Router(score="linear", renormalize=True),
    "softmax_over_all": Router(order="before_top_k"),
    "softmax_over_the_chosen": Router(),
    "sigmoid_scaled": Router("sigmoid", "before_top_k", renormalize=True, scale=2.5),
}


def oracle(logits, mixing, k, router):
    ids, weights = np.zeros((len(logits), k), np.int64), np.zeros((len(logits), k))
    for t, (row, mixed) in enumerate(zip(logits, mixing, strict=True)):
        before = router.order == "before_top_k"
        ids[t] = best(scores_of(row, router.score) if before else row, k)
        weights[t] = (
            scores_of(mixed, router.score)[ids[t]]
            if before
            else scores_of(mixed[ids[t]], router.score)
        )
        if router.renormalize:
            weights[t] /= weights[t].sum()
    return ids, weights * router.scale


@pytest.fixture
def tensors(rng):
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    return logits, rng.uniform(0.1, 1, size=(TOKENS, EXPERTS)).astype(np.float32)


@pytest.mark.parametrize("name", ROUTERS)
def test_r7_weights_come_from_another_tensor(tensors, name):
    logits, mixing = tensors
    ours = moe_jax.route(
        f32(logits, "s", "expert"), K, ROUTERS[name], mixing=f32(mixing.T, "expert", "s")
    )
    ids, weights = oracle(logits, mixing, K, ROUTERS[name])
    np.testing.assert_array_equal(ours.ids.array, ids)
    np.testing.assert_allclose(ours.weights.array, weights, rtol=3e-6)


@pytest.mark.parametrize("algorithm", ["per_token", "dense", "grouped", "fixed_budget"])
def test_every_algorithm(tensors, rng, algorithm):
    logits, mixing = tensors
    experts = TinyExperts.random(rng, EXPERTS, HIDDEN)
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    router = ROUTERS["divided_by_their_sum"]
    y = moe(
        experts.ours(), x, np.abs(logits), experts_per_token=K, normalization=router,
        mixing=mixing, algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
    )  # fmt: skip
    expected = combine(x, *oracle(np.abs(logits), mixing, K, router), experts)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_nan_of_either_tensor_shows_and_masked_tokens_are_none(tensors):
    logits, mixing = tensors
    mixing[1, 0], logits[2, 0], mixing[4] = np.nan, np.nan, np.nan
    mask = tag(jnp.arange(TOKENS) != 4, "s")

    def total(mixing):
        routing = moe_jax.route(
            f32(logits, "s", "expert"), K, ROUTERS["as_they_are"], mixing=mixing, token_mask=mask
        )
        return jnp.nansum(routing.weights.array), routing

    (_, ours), gradient = jax.value_and_grad(total, has_aux=True)(f32(mixing, "s", "expert"))
    unknown = np.isnan(ours.weights.array)
    np.testing.assert_array_equal(unknown, np.isin(np.arange(TOKENS), [1, 2])[:, None] | unknown)
    assert unknown.sum() == 2 * K
    np.testing.assert_array_equal(ours.ids.array[4], EXPERTS)
    np.testing.assert_array_equal(ours.weights.array[4], 0)
    np.testing.assert_array_equal(gradient.array[4], 0)
    for algorithm in ("grouped", "fixed_budget"):
        y = moe(
            moe_jax.Identity(), jnp.ones((TOKENS, HIDDEN)), np.abs(logits), experts_per_token=K,
            normalization=ROUTERS["as_they_are"], mixing=mixing, token_mask=mask.array,
            algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
        )  # fmt: skip
        np.testing.assert_array_equal(np.isnan(y).all(1), np.isin(np.arange(TOKENS), [1, 2]))
        np.testing.assert_array_equal(y[4], 0)


def test_gradients_reach_what_weighs_and_not_what_selects(tensors):
    logits, mixing = (f32(t, "s", "expert") for t in tensors)
    function = lambda a, b: moe_jax.route(a, K, mixing=b).weights.array[:, 0].sum()  # noqa: E731
    selected, weighed = jax.grad(function, argnums=(0, 1))(logits, mixing)
    np.testing.assert_array_equal(selected.array, 0)
    assert np.abs(weighed.array).max() > 0


def test_refuses(tensors):
    logits, mixing = tensors
    with pytest.raises(
        ValueError, match="mixing must have the axes and sizes of the logits {s=9, expert=6}"
    ):
        moe_jax.route(f32(logits, "s", "expert"), K, mixing=f32(mixing[1:], "s", "expert"))
    x = np.ones((TOKENS, HIDDEN), np.float32)

    def layer(mixing):
        moe_jax.mixture_of_experts(
            moe_jax.Identity(), x, logits, experts_per_token=K, mixing=mixing
        )

    with pytest.raises(ValueError, match="mixing must have the sizes of gating"):
        layer(mixing[:, 1:])
    with pytest.raises(ValueError, match="axis 's' has different sizes"):
        layer(mixing[1:])
    with pytest.raises(TypeError, match="mixing must be floats, got int32"):
        layer(mixing.astype(np.int32))

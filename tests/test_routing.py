"""Routing against NumPy float64, and what becomes of ties, NaN, -inf and masked tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, f32, ratio_for, route, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_jax
from moe_jax import Router, tag
from moe_jax.routing import LINEAR_ROUTER, expert_scores, router_logits, selection_scores

ROUTERS = {
    "gpt_oss": Router(),
    "softmax_before": Router(order="before_top_k"),
    "softmax_before_renormalized": Router(order="before_top_k", renormalize=True),
    "sigmoid": Router(score="sigmoid"),
    "sigmoid_before_scaled": Router("sigmoid", "before_top_k", renormalize=True, scale=2.5),
    "groups_by_best": Router(num_groups=4, groups_per_token=2),
    "groups_by_best_two": Router(
        "sigmoid", "before_top_k", True, num_groups=3, groups_per_token=2, group_score="top2_sum"
    ),
    "linear": LINEAR_ROUTER,
}


def check(ours: moe_jax.Routing, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert ours.ids.axes == ours.weights.axes == ("s", "top_expert")
    assert ours.ids.dtype == jnp.int32 and ours.weights.dtype == jnp.float32
    np.testing.assert_array_equal(ours.ids.array, expected[0])
    np.testing.assert_allclose(ours.weights.array, expected[1], rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(rng, name, k):
    logits = (2 * rng.normal(size=(17, 12))).astype(np.float32)
    if name == "linear":
        logits = np.abs(logits)
    expected = route(logits, k, ROUTERS[name])
    check(moe_jax.route(f32(logits, "s", "expert"), k, ROUTERS[name]), expected)
    transposed = f32(logits.T, "expert", "s")
    check(jax.jit(moe_jax.route, static_argnums=(1, 2))(transposed, k, ROUTERS[name]), expected)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4),
    k=st.integers(1, 5),
    order=st.sampled_from(["after_top_k", "before_top_k"]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
)
def test_any_small_integers_with_ties(values, k, order, score, renormalize):
    logits = np.array(values, np.float32)
    router = Router(score, order, renormalize)
    with jax.disable_jit():
        check(moe_jax.route(f32(logits, "s", "expert"), k, router), route(logits, k, router))


@pytest.mark.parametrize("router", [Router(), Router(order="before_top_k")])
def test_ties_go_to_the_lowest_index(router, record_property):
    record_property("trap", "5")
    ids = moe_jax.route(f32(np.zeros((2, 7)), "s", "expert"), 3, router).ids
    np.testing.assert_array_equal(ids.array, [[0, 1, 2]] * 2)


@pytest.mark.parametrize("router", [Router(), LINEAR_ROUTER, Router(num_groups=2)])
def test_zeros_of_either_sign_are_a_tie(router):
    """top_k ranks -0 below 0; numbers next to zero are no tie with it."""
    logits = np.array([[-0.0, 0.0, -1.0, -2.0], [0.0, -0.0, -1.0, -2.0], [0.0, 1e-40, -1.0, -2.0]])
    for function in (moe_jax.route, jax.jit(moe_jax.route, static_argnums=(1, 2))):
        ids = function(f32(logits, "s", "expert"), 1, router).ids
        np.testing.assert_array_equal(ids.array, [[0], [0], [1]])
    bias = moe_jax.route(
        f32(logits[:1], "s", "expert"), 1, router, selection_bias=f32(-np.zeros(4), "expert")
    )
    np.testing.assert_array_equal(bias.ids.array, [[0]])


def test_selection_scores_are_float32_without_signed_zeros():
    logits = tag(jnp.array([[-0.0, 0.0, 1.5, -jnp.inf]], jnp.bfloat16), "s", "expert")
    scores = selection_scores(logits, Router()).array
    assert scores.dtype == jnp.float32 and not np.signbit(scores[0, :2]).any()
    np.testing.assert_array_equal(scores, [[0, 0, 1.5, -np.inf]])


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_logit_of_zero_has_its_gradient(zero):
    gradient = jax.grad(lambda logits: moe_jax.route(logits, 2).weights.array[0, 0])(
        f32(np.array([[zero, -1.0, -5.0]]), "s", "expert")
    )
    slope = np.exp(-1.0) / (1 + np.exp(-1.0)) ** 2
    np.testing.assert_allclose(gradient.array, [[slope, -slope, 0]], rtol=1e-5)


def test_the_bias_selects_and_does_not_weigh(rng):
    logits = rng.normal(size=(9, 6)).astype(np.float32)
    bias = np.array([0, 0, 5, 0, -5, 0.5])
    router = Router("sigmoid", "before_top_k", renormalize=True)
    ours = moe_jax.route(f32(logits, "s", "expert"), 2, router, selection_bias=f32(bias, "expert"))
    check(ours, route(logits, 2, router, bias))
    assert (np.asarray(ours.ids.array) == 2).any(1).all()
    assert not (np.asarray(ours.ids.array) == 4).any()


def test_router_logits_with_bias_and_as_centroids(rng):
    x, w, b = rng.normal(size=(4, 5)), rng.normal(size=(6, 5)), rng.normal(size=6)
    ours = router_logits(f32(x, "s", "d"), f32(w.T, "d", "expert"), f32(b, "expert"))
    assert ours.axes == ("s", "expert")
    np.testing.assert_allclose(ours.array, x @ w.T + b, rtol=1e-5, atol=1e-5)
    low = router_logits(f32(x, "s", "d").astype(jnp.bfloat16), f32(w, "expert", "d"))
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low.array, rounded @ w.T, rtol=1e-5, atol=1e-5)
    base = moe_jax.route(low, 1, Router("sigmoid"))
    check(base, route(np.asarray(low.array), 1, Router("sigmoid")))


def test_several_token_axes(rng):
    logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
    ours = moe_jax.route(f32(logits, "b", "s", "expert"), 2)
    assert ours.ids.axes == ("b", "s", "top_expert")
    ids, weights = route(logits.reshape(6, 4), 2, Router())
    np.testing.assert_array_equal(ours.ids.array, ids.reshape(2, 3, 2))
    np.testing.assert_allclose(ours.weights.array, weights.reshape(2, 3, 2), rtol=3e-6)


def test_low_precision_logits_are_scored_in_float32():
    logits = tag(jnp.array([[1.0, 1.0078125, 1.015625]], jnp.bfloat16), "s", "expert")
    check(moe_jax.route(logits, 3), route(np.asarray(logits.array, np.float32), 3, Router()))


def test_expert_scores(rng):
    logits = rng.normal(size=(4, 6)).astype(np.float32)
    for score in ("softmax", "sigmoid", "linear"):
        ours = expert_scores(f32(logits.T, "expert", "s"), Router(score))
        assert ours.axes == ("s", "expert")
        np.testing.assert_allclose(ours.array, scores_of(logits, score), rtol=3e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "linear"])
def test_nan_stays_in_its_row(rng, name, sign, record_property):
    """top_k ranks a NaN first or last, by its sign bit; the row must show it either way."""
    record_property("trap", "6")
    record_property("bad_input", "NaN logit / x")
    logits = rng.normal(size=(3, 12)).astype(np.float32)
    clean = moe_jax.route(f32(logits, "s", "expert"), 2, ROUTERS[name])
    logits[1, 5] = np.copysign(np.nan, sign)
    weights = moe_jax.route(f32(logits, "s", "expert"), 2, ROUTERS[name]).weights.array
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(weights[np.array([0, 2])], clean.weights.array[np.array([0, 2])])


@pytest.mark.parametrize("name", ROUTERS)
def test_a_row_of_minus_infinity_weighs_nothing_and_has_no_gradient(rng, name, record_property):
    record_property("trap", "6")
    record_property("bad_input", "all -inf row")
    logits = np.abs(rng.normal(size=(3, 12))).astype(np.float32)
    logits[1] = -np.inf

    def total(values: moe_jax.Tagged):
        weights = moe_jax.route(values, 2, ROUTERS[name]).weights.array
        return (weights * jnp.array([[1.0, 3.0]])).sum(), weights

    (_, weights), gradient = jax.value_and_grad(total, has_aux=True)(f32(logits, "s", "expert"))
    np.testing.assert_array_equal(weights[1], 0)
    assert (weights[0] > 0).all()
    np.testing.assert_array_equal(gradient.array[1], 0)
    assert np.isfinite(gradient.array).all() and np.abs(gradient.array[0]).sum() > 0


def test_experts_at_minus_infinity_weigh_nothing():
    logits = np.array([[-np.inf, 1.0, -np.inf, 0.5]], np.float32)
    ours = moe_jax.route(f32(logits, "s", "expert"), 3)
    np.testing.assert_array_equal(ours.ids.array, [[1, 3, 4]])
    np.testing.assert_allclose(ours.weights.array[0, :2].sum(), 1, rtol=1e-6)
    assert ours.weights.array[0, 2] == 0


def test_masked_tokens_have_no_expert_whatever_they_hold(rng):
    logits = rng.normal(size=(4, 6)).astype(np.float32)
    free = moe_jax.route(f32(logits, "s", "expert"), 2)
    logits[1], logits[3] = np.nan, np.inf
    mask = tag(jnp.array([True, False, True, False]), "s")

    def masked(values: moe_jax.Tagged):
        routing = moe_jax.route(values, 2, token_mask=mask)
        return (routing.weights.array * jnp.array([[1.0, 3.0]])).sum(), routing

    (_, ours), gradient = jax.value_and_grad(masked, has_aux=True)(f32(logits, "s", "expert"))
    np.testing.assert_array_equal(ours.ids.array[1::2], 6)
    np.testing.assert_array_equal(ours.weights.array[1::2], 0)
    np.testing.assert_array_equal(ours.ids.array[::2], free.ids.array[::2])
    np.testing.assert_array_equal(ours.weights.array[::2], free.weights.array[::2])
    np.testing.assert_array_equal(gradient.array[1::2], 0)


def test_linear_gating():
    logits = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 2.0, -0.5]], np.float32)
    weights = moe_jax.route(f32(logits, "s", "expert"), 2, LINEAR_ROUTER).weights.array
    np.testing.assert_allclose(weights[:2], [[0.75, 0.25], [0, 0]])
    assert np.isnan(weights[2]).all()


def test_no_tokens():
    routing = moe_jax.route(f32(np.zeros((0, 5)), "s", "expert"), 2)
    assert routing.ids.shape == routing.weights.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "relu"}, "score must be one of .* got 'relu'"),
        ({"order": "never"}, "order must be one of .* got 'never'"),
        ({"group_score": "mean"}, "group_score must be one of .* got 'mean'"),
        ({"num_groups": 2, "groups_per_token": 3}, "between 1 and num_groups=2, got 3"),
        ({"groups_per_token": 0}, "between 1 and num_groups=1, got 0"),
    ],
)
def test_a_router_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(**arguments)


def test_route_refuses(record_property):
    record_property("bad_input", "K<1, K>E")
    logits = f32(np.zeros((2, 6)), "s", "expert")
    for k in (0, 7, -1):
        with pytest.raises(ValueError, match=f"between 1 and the number of experts 6, got {k}"):
            moe_jax.route(logits, k)
    for k in (2.0, True, "2", None):
        with pytest.raises(TypeError, match="experts_per_token must be an int"):
            moe_jax.route(logits, k)
    with pytest.raises(ValueError, match="num_groups=4 must divide the number of experts 6"):
        moe_jax.route(logits, 1, Router(num_groups=4))
    with pytest.raises(ValueError, match="experts_per_token=3 is more than the 2 experts"):
        moe_jax.route(logits, 3, Router(num_groups=3))
    with pytest.raises(ValueError, match="no axis 'expert' among {s, e}"):
        moe_jax.route(logits.rename(expert="e"), 2)
    with pytest.raises(ValueError, match="axis 'expert' has different sizes"):
        moe_jax.route(logits, 2, selection_bias=f32(np.zeros(5), "expert"))
    with pytest.raises(ValueError, match="axis 's' has different sizes"):
        moe_jax.route(logits, 2, token_mask=tag(jnp.ones(3, bool), "s"))


def exact_and_budget(logits, k, **options):
    """The layer's result by all four algorithms, the budget being large, and their reports."""
    experts = TinyExperts.random(np.random.default_rng(0), logits.shape[1], 5).ours()
    x = np.random.default_rng(1).normal(size=(len(logits), 5)).astype(np.float32)
    found = []
    for algorithm in ("per_token", "dense", "grouped", "fixed_budget"):
        y, report = moe_jax.mixture_of_experts(
            experts, f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=k,
            algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
            with_report=True, **options,
        )  # fmt: skip
        found.append((np.asarray(y.array), [int(n) for n in jax.tree.leaves(report)]))
    return found


@pytest.mark.parametrize(
    "logits, k, options, ids",
    [
        # the barred member of the best group is not made up for from another group
        ([1.0, 2.0, 5.0, -np.inf], 2, {"router": Router(num_groups=2)}, [2, 4]),
        # a bias cannot lift a barred expert over an open one
        (
            [-np.inf, 2.0, 1.0, 0.0],
            1,
            {"router": Router("sigmoid", "before_top_k"), "bias": [9.0, 0.0, 0.0, 0.0]},
            [1],
        ),
        # nor does a bias of -inf leave an expert its weight
        ([3.0, 2.0, 1.0, 0.0], 4, {"bias": [-np.inf, 0.0, 0.0, 0.0]}, [1, 2, 3, 4]),
        ([-np.inf] * 4, 2, {}, [4, 4]),
    ],
)
def test_barred_experts_are_none_for_every_algorithm(logits, k, options, ids):
    logits = np.array([logits], np.float32)
    router = options.get("router", Router())
    bias = jnp.asarray(options.get("bias", [0.0] * 4))
    ours = moe_jax.route(f32(logits, "s", "expert"), k, router, selection_bias=tag(bias, "expert"))
    np.testing.assert_array_equal(ours.ids.array, [ids])
    assert not np.asarray(ours.weights.array)[0][np.array(ids) == 4].any()
    (first, counts), *others = exact_and_budget(
        logits, k, normalization=router, selection_bias=bias
    )
    assert counts == [sum(i < 4 for i in ids), 0, 0, int(all(i == 4 for i in ids))]
    for y, report in others:
        np.testing.assert_allclose(y, first, atol=5e-5)
        assert report == counts


def test_a_nan_with_its_sign_set_shows_even_among_barred_experts():
    logits = np.array([[-np.float32(np.nan), -np.inf, -np.inf, -np.inf]], np.float32)
    for y, _ in exact_and_budget(logits, 1):
        assert np.isnan(y).all()

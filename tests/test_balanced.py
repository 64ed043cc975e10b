"""Balanced routing against SciPy's solver of the linear assignment problem."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import f32, sigmoid
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import moe_jax
from moe_jax import Router, balanced_assignment, route_balanced, tag
from moe_jax.routing import router_logits

compiled = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time
)
assign = compiled(balanced_assignment, static_argnames=("tolerance", "max_rounds"))
route = compiled(route_balanced, static_argnames=("router", "tolerance", "max_rounds"))


def greatest_sum(scores: np.ndarray) -> float:
    """Of scores [tokens, experts], each expert having ceil(tokens / experts) places."""
    places = -(-len(scores) // scores.shape[1])
    wide = np.repeat(scores.astype(np.float64), places, axis=1)
    return float(wide[linear_sum_assignment(wide, maximize=True)].sum())


def gap(scores: np.ndarray, ids: np.ndarray, tolerance: float) -> float:
    """How far the sum is below the greatest, as a part of the range; checks counts and bound."""
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    assert np.bincount(ids, minlength=experts).shape == (experts,)
    assert np.bincount(ids, minlength=experts).max() <= places
    span = float(scores.max()) - float(scores.min())
    below = greatest_sum(scores) - scores[np.arange(tokens), ids].astype(np.float64).sum()
    assert below <= (tolerance * places * experts + 1e-5) * span + 1e-30
    return below / span if span else 0.0


def sharp(rng, tokens, experts):
    return 5 * rng.normal(size=(1, experts)) + rng.normal(size=(tokens, experts))


def alike(rng, tokens, experts):
    kinds = rng.normal(size=(2, experts))
    return kinds[rng.integers(0, 2, tokens)] + 0.01 * rng.normal(size=(tokens, experts))


KINDS = {
    "normal": lambda rng, tokens, experts: rng.normal(size=(tokens, experts)),
    "few_values": lambda rng, tokens, experts: rng.integers(0, 3, (tokens, experts)),
    "all_want_the_same": lambda rng, tokens, experts: np.tile(
        rng.normal(size=experts), (tokens, 1)
    ),
    "sharp": sharp,
    "alike": alike,
    "large": lambda rng, tokens, experts: 1e38 * rng.normal(size=(tokens, experts)).clip(-3, 3),
    "small": lambda rng, tokens, experts: 1e-30 * rng.normal(size=(tokens, experts)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_r5_balanced_assignment_reaches_the_optimum(rng, kind, record_property):
    scores = KINDS[kind](rng, 24, 6).astype(np.float32)
    found = assign(f32(scores, "s", "expert"), tolerance=1e-5)
    assert found.ids.axes == ("s",) and found.ids.dtype == jnp.int32
    assert found.tolerance == np.float32(1e-5) and 0 < found.rounds < 10_000
    ids = np.asarray(found.ids.array)
    np.testing.assert_array_equal(np.bincount(ids, minlength=6), 4)
    error = gap(scores, ids, 1e-5)
    record_property("row", "R5")
    record_property("error", float(error))
    record_property("with", "scipy.optimize.linear_sum_assignment")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(
        st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=6, max_size=6
    ).map(lambda rows: np.array(rows, np.float32))
)
def test_whole_numbers_are_assigned_exactly(values):
    """Six tokens, a range of at most 8: within 6 x 8 x 0.01 < 1 of the optimum is the optimum."""
    found = assign(f32(values, "s", "expert"), tolerance=0.01)
    ids = np.asarray(found.ids.array)
    np.testing.assert_array_equal(np.bincount(ids, minlength=3), 2)
    assert values[np.arange(6), ids].sum() == greatest_sum(values)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=7, max_size=7).map(
        lambda rows: np.array(rows, np.float32)
    ),
)
def test_any_floats_where_experts_do_not_divide_the_tokens(values):
    ids = np.asarray(assign(f32(values, "s", "expert")).ids.array)
    finite = values[np.isfinite(values)].astype(np.float64)
    known = np.where(np.isfinite(values), values, finite.min(initial=np.inf) if finite.size else 0)
    gap(known.astype(np.float64), ids, 1e-4)


def test_masked_tokens_get_no_expert_and_take_no_place(rng):
    scores = rng.normal(size=(12, 4)).astype(np.float32)
    keep = np.isin(np.arange(12), [0, 3, 4, 5, 7, 8, 10, 11])
    scores[1] = np.nan
    scores[2] = 1e30
    found = assign(f32(scores, "s", "expert"), token_mask=tag(jnp.asarray(keep), "s"))
    ids = np.asarray(found.ids.array)
    np.testing.assert_array_equal(ids[~keep], 4)
    np.testing.assert_array_equal(np.bincount(ids[keep], minlength=4), 2)
    gap(scores[keep], ids[keep], 1e-4)
    nobody = assign(f32(scores, "s", "expert"), token_mask=tag(jnp.zeros(12, bool), "s"))
    np.testing.assert_array_equal(nobody.ids.array, 4)


@pytest.mark.parametrize("max_rounds", [0, 1, 3, 40])
def test_counts_are_equal_even_where_rounds_do_not_suffice(rng, max_rounds):
    scores = f32(sharp(rng, 24, 6), "s", "expert")
    found = assign(scores, max_rounds=max_rounds, tolerance=1e-6)
    np.testing.assert_array_equal(np.bincount(found.ids.array, minlength=6), 4)
    assert int(found.rounds) == max_rounds
    assert (found.tolerance == np.inf) == (max_rounds < 40)
    if max_rounds == 40:
        gap(np.asarray(scores.array), np.asarray(found.ids.array), float(found.tolerance))


@pytest.mark.parametrize("tokens, experts", [(0, 3), (1, 1), (5, 1), (2, 6)])
def test_few_tokens_and_experts(rng, tokens, experts):
    scores = rng.normal(size=(tokens, experts)).astype(np.float32)
    ids = np.asarray(assign(f32(scores, "s", "expert")).ids.array)
    assert ids.shape == (tokens,)
    if tokens:
        assert np.bincount(ids).max() <= -(-tokens // experts)


def test_routing_is_weighed_by_the_router_and_has_gradients(rng):
    logits = rng.normal(size=(2, 6, 4)).astype(np.float32)
    tagged = f32(logits.transpose(2, 0, 1), "expert", "b", "s")
    ours = route(tagged)
    assert ours.ids.axes == ours.weights.axes == ("b", "s", "top_expert")
    ids = np.asarray(ours.ids.array)
    np.testing.assert_array_equal(np.bincount(ids.reshape(-1)), 3)
    chosen = np.take_along_axis(logits, ids, -1)
    np.testing.assert_allclose(ours.weights.array, sigmoid(chosen), rtol=1e-6)
    total = jax.grad(lambda values: route_balanced(values).weights.array.sum())
    gradient = compiled(total)(tagged)
    expected = np.zeros(logits.shape)
    np.put_along_axis(expected, ids, sigmoid(chosen) * (1 - sigmoid(chosen)), -1)
    np.testing.assert_allclose(gradient.untag("b", "s", "expert"), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(route(tagged, Router()).weights.array, 1)


def test_nan_shows_in_its_row_and_masked_tokens_weigh_nothing(rng):
    logits = rng.normal(size=(12, 4)).astype(np.float32)
    logits[3, 1] = np.nan
    logits[5] = np.inf
    mask = tag(jnp.arange(12) != 5, "s")

    def total(values):
        routing = route_balanced(values, token_mask=mask)
        return jnp.nansum(routing.weights.array), routing

    differentiated = compiled(jax.value_and_grad(total, has_aux=True))
    (_, ours), gradient = differentiated(f32(logits, "s", "expert"))
    weights = np.asarray(ours.weights.array)[:, 0]
    np.testing.assert_array_equal(np.isnan(weights), np.arange(12) == 3)
    assert weights[5] == 0 and ours.ids.array[5, 0] == 4
    assert np.bincount(ours.ids.array[:, 0], minlength=5).max() <= 3
    np.testing.assert_array_equal(gradient.array[5], 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tolerance": 0.0}, "tolerance must be between 1e-6 and 1, got 0.0"),
        ({"max_rounds": -1}, "max_rounds must not be negative, got -1"),
        ({"router": Router(num_groups=2)}, "balanced routing has no groups, got num_groups=2"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        route_balanced(f32(np.ones((4, 2)), "s", "expert"), **options)


def test_refuses_what_does_not_fit():
    scores = f32(np.ones((4, 2)), "s", "expert")
    with pytest.raises(ValueError, match="there are no experts in"):
        balanced_assignment(f32(np.ones((4, 0)), "s", "expert"))
    with pytest.raises(ValueError, match="token_mask must be {s=4}, got {s=3}"):
        balanced_assignment(scores, token_mask=tag(jnp.ones(3, bool), "s"))
    with pytest.raises(ValueError, match="expected the axes"):
        balanced_assignment(scores.rename(s="b"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Move:
    """Adds its shift {expert, d} to every row."""

    shift: moe_jax.Tagged

    def __call__(self, x):
        return x + self.shift


def test_a_base_layer_trains_on_balanced_routing(rng):
    """Centroids learn through the sigmoid alone, and experts stay evenly used."""
    x = rng.normal(size=(12, 5)).astype(np.float32)
    shift = f32(rng.normal(size=(4, 5)), "expert", "d")
    centroids = f32(rng.normal(size=(4, 5)), "expert", "d")
    rows = f32(x, "s", "d")

    def output(centroids):
        routing = route_balanced(router_logits(rows, centroids))
        y = moe_jax.fused_experts(
            rows, routing.ids, routing.weights, Move(shift), remaining_weight="input"
        )
        return y.array, routing

    y, routing = compiled(output)(centroids)
    ids, weights = np.asarray(routing.ids.array)[:, 0], np.asarray(routing.weights.array)
    np.testing.assert_array_equal(np.bincount(ids), 3)
    expected = x + weights * np.asarray(shift.array)[ids]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    gradient = compiled(jax.grad(lambda c: output(c)[0].sum()))(centroids)
    slope = weights * (1 - weights) * np.asarray(shift.array)[ids].sum(1, keepdims=True)
    by_expert = np.stack([(slope * x)[ids == e].sum(0) for e in range(4)])
    np.testing.assert_allclose(gradient.array, by_expert, rtol=1e-4, atol=1e-5)

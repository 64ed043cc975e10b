"""The choice of algorithm, and each algorithm against NumPy float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, combine, expert_choice, f32, moe, ratio_for, route, softmax
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moe_jax
from moe_jax import Router, choose_algorithm, tag
from moe_jax.dispatch import plan_fixed_budget, token_budget
from moe_jax.routing import expert_scores

EXPERTS, HIDDEN, K = 6, 5, 2
EXACT = ("per_token", "dense", "grouped")


@pytest.fixture(scope="module")
def experts() -> TinyExperts:
    return TinyExperts.random(np.random.default_rng(7), EXPERTS, HIDDEN)


@functools.partial(
    jax.jit, static_argnums=3, compiler_options={"xla_backend_optimization_level": 0}
)
def run_exact(ours, x, gating, k):
    return {
        name: moe_jax.mixture_of_experts(ours, x, gating, experts_per_token=k, algorithm=name)
        for name in EXACT
    }


def gatings(rng: np.random.Generator, tokens: int) -> dict[str, np.ndarray]:
    """Logits in every way of being awkward."""
    free = rng.normal(size=(tokens, EXPERTS))
    avoided, collapsed = free.copy(), free.copy()
    avoided[:, 3] = -50
    collapsed[:, 4] = 50
    ties = rng.integers(0, 2, (tokens, EXPERTS))
    named = {"free": free, "avoided": avoided, "collapsed": collapsed, "ties": ties}
    return {name: logits.astype(np.float32) for name, logits in named.items()}


def compare(experts: TinyExperts, rng: np.random.Generator, tokens: int, k: int) -> None:
    x = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
    for name, logits in gatings(rng, tokens).items():
        expected = combine(x, *route(logits, k, Router()), experts)
        outputs = run_exact(experts.ours(), f32(x, "s", "d"), f32(logits, "s", "expert"), k)
        for algorithm, y in outputs.items():
            np.testing.assert_allclose(
                y.array, expected, rtol=5e-5, atol=5e-5, err_msg=f"{algorithm} {name}"
            )


@pytest.mark.parametrize("tokens", [*range(0, 9), 15, 16, 26, 27, 28, 50, 51, 52, 64])
def test_exact_algorithms_agree_with_float64_around_each_switch(rng, experts, tokens):
    """Both sides of every switch point for these sizes.

    Those of `choose_algorithm`, at 4, and of the height of the blocks of `grouped`, at 27 and 51.
    """
    compare(experts, rng, tokens, K)


@pytest.mark.parametrize("k", [1, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 7])
def test_one_expert_a_token_and_all_experts_a_token(rng, experts, tokens, k):
    compare(experts, rng, tokens, k)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_auto_agrees_around_its_switch_points(rng, k):
    """Sizes where `auto` goes from per_token to dense or grouped between two token counts."""
    experts = TinyExperts.random(rng, num_experts=8, hidden=HIDDEN)
    switch = 8 // k
    before, after = (choose_algorithm(t, 8, k) for t in (switch, switch + 1))
    assert before == "per_token" and after == ("dense" if k == 4 else "grouped")
    x = rng.normal(size=(switch + 1, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(switch + 1, 8)).astype(np.float32)
    expected = combine(x, *route(logits, k, Router()), experts)
    for tokens in (switch - 1, switch, switch + 1):
        y = moe(
            experts.ours(), x[:tokens] + jnp.zeros(()), jnp.asarray(logits[:tokens]),
            experts_per_token=k,
        )  # fmt: skip
        np.testing.assert_allclose(y, expected[:tokens], rtol=5e-5, atol=5e-5)


def test_choose_algorithm_without_a_ratio():
    assert choose_algorithm(0, 32, 4) == "per_token"
    assert choose_algorithm(1, 32, 4) == choose_algorithm(8, 32, 4) == "per_token"
    assert choose_algorithm(9, 32, 4) == choose_algorithm(10**6, 32, 4) == "grouped"
    assert choose_algorithm(1, 4, 4) == "per_token"
    assert choose_algorithm(2, 4, 4) == choose_algorithm(3, 4, 2) == "dense"
    assert choose_algorithm(3, 5, 2) == "grouped"


def test_choose_algorithm_with_a_ratio():
    assert choose_algorithm(1, 32, 4, 1.0) == choose_algorithm(0, 32, 4, 1.0) == "per_token"
    assert choose_algorithm(11, 32, 4, 1.0) == "dense"
    assert choose_algorithm(12, 32, 4, 1.0) == choose_algorithm(512, 32, 4, 1.0) == "fixed_budget"
    assert choose_algorithm(512, 32, 4, 5.0) == "fixed_budget"
    assert choose_algorithm(512, 32, 4, 6.0) == "dense"


@given(
    tokens=st.integers(0, 5000),
    experts=st.integers(1, 256),
    k=st.integers(1, 256),
    ratio=st.none() | st.floats(0.01, 100),
)
def test_choose_algorithm_runs_fixed_budget_only_where_asked(tokens, experts, k, ratio):
    k = min(k, experts)
    name = choose_algorithm(tokens, experts, k, ratio)
    if ratio is None:
        assert name in EXACT
    else:
        budget = token_budget(tokens, experts, k, ratio)
        assert (name == "fixed_budget") == (tokens > 1 and 3 * budget <= 2 * tokens)


@given(
    tokens=st.integers(0, 5000),
    experts=st.integers(1, 256),
    k=st.integers(1, 256),
    ratio=st.floats(0.01, 100),
)
@example(tokens=100, experts=32, k=4, ratio=0.65)
def test_token_budget_is_never_less_than_asked(tokens, experts, k, ratio):
    k = min(k, experts)
    asked = ratio * tokens * k / experts
    budget = token_budget(tokens, experts, k, ratio)
    assert budget == tokens or (budget % 8 == 0 and budget >= asked * (1 - 1e-12))
    assert budget <= tokens and budget < asked + 9


def test_token_budget_values():
    assert token_budget(512, 32, 4, 1.0) == 64
    assert token_budget(512, 32, 4, 1.01) == 72
    assert token_budget(100, 32, 4, 0.65) == 16
    assert token_budget(6, 3, 2, 1.0) == 6
    assert token_budget(0, 3, 2, 1.0) == 0
    assert token_budget(64, 8, 2, np.float32(1.5)) == 24


@pytest.mark.parametrize("ratio", [0, 0.0, -1.0, math.nan, math.inf, "1"])
def test_token_budget_refuses(ratio, record_property):
    record_property("bad_input", "budget ratio")
    with pytest.raises(ValueError, match="must be a positive number, got .* leave it None"):
        token_budget(64, 8, 2, ratio)


def plan_of(logits, k, budget, overflow, mask=None):
    tagged = f32(logits, "s", "expert")
    ours = plan_fixed_budget(
        tagged,
        k,
        budget,
        Router(),
        overflow=overflow,
        token_mask=None if mask is None else tag(jnp.asarray(mask), "s"),
    )
    priority = np.asarray(expert_scores(tagged, Router()).array)
    return ours, expert_choice(logits, priority, k, budget, overflow, mask)


def check_plan(logits, k, budget, overflow, mask=None) -> None:
    ours, expected = plan_of(logits, k, budget, overflow, mask)
    for t, (ids, valid, slots) in enumerate(
        zip(*(np.asarray(v.array) for v in (ours.ids, ours.valid, ours.slot)), strict=True)
    ):
        assert list(ids[valid]) == expected.kept[t]
        for e, slot in zip(ids[valid], slots[valid], strict=True):
            assert ours.slot_token.array[e, slot] == t
    for name in ("assigned", "rerouted", "dropped", "empty_tokens"):
        assert int(getattr(ours.report, name)) == getattr(expected, name), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 2, 5]),
    budget=st.sampled_from([1, 3, 8, 12]),
    overflow=st.sampled_from(["reroute", "drop"]),
    skew=st.sampled_from([0.0, 1.0, 4.0]),
    awkward=st.sampled_from(["none", "ties", "barred"]),
    masked=st.booleans(),
)
def test_fixed_budget_plans_what_the_oracle_plans(seed, k, budget, overflow, skew, awkward, masked):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(12, 5)) + skew * np.arange(5)).astype(np.float32)
    if awkward == "ties":
        logits[6:] = logits[:6]
    if awkward == "barred":
        logits[rng.random((12, 5)) < 0.3] = -np.inf
        logits[3] = -np.inf
    check_plan(logits, k, budget, overflow, rng.random(12) < 0.6 if masked else None)


def test_fixed_budget_by_hand():
    """One expert wanted by all three tokens, with room for one."""
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.7, 0.1, 0.2]], np.float32))
    rerouted, _ = plan_of(logits, 1, 1, "reroute")
    np.testing.assert_array_equal(rerouted.ids.array[:, 0], [1, 0, 2])
    assert [int(v) for v in jax.tree.leaves(rerouted.report)] == [3, 2, 2, 0]
    dropped, _ = plan_of(logits, 1, 1, "drop")
    np.testing.assert_array_equal(dropped.valid.array[:, 0], [False, True, False])
    assert [int(v) for v in jax.tree.leaves(dropped.report)] == [1, 0, 2, 2]
    masked, _ = plan_of(logits, 1, 1, "drop", np.array([True, False, True]))
    np.testing.assert_array_equal(masked.valid.array[:, 0], [False, False, True])
    assert [int(v) for v in jax.tree.leaves(masked.report)] == [1, 0, 1, 1]


@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_fixed_budget_values(rng, experts, overflow, record_property):
    x = rng.normal(size=(40, HIDDEN)).astype(np.float32)
    logits = (rng.normal(size=(40, EXPERTS)) + np.arange(EXPERTS)).astype(np.float32)
    y, report = moe(
        experts.ours(), f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=K,
        tokens_per_expert_ratio=0.8, overflow=overflow, with_report=True,
    )  # fmt: skip
    assert choose_algorithm(40, EXPERTS, K, 0.8) == "fixed_budget"
    budget = token_budget(40, EXPERTS, K, 0.8)
    plan = expert_choice(logits, softmax(logits), K, budget, overflow)
    expected = np.zeros(x.shape)
    for t, kept in enumerate(plan.kept):
        if kept:
            weights = softmax(logits[t, kept])
            expected[t] = sum(w * experts(e, x[t]) for w, e in zip(weights, kept, strict=True))
    np.testing.assert_allclose(y.array, expected, rtol=5e-5, atol=5e-5)
    record_property("row", "A4")
    record_property("with", "NumPy float64")
    record_property("error", float(np.abs(y.array - expected).max() / np.abs(expected).max()))
    assert int(report.dropped) == plan.dropped > 0
    assert int(report.rerouted) == plan.rerouted and (plan.rerouted > 0) == (overflow == "reroute")


@pytest.mark.parametrize("overflow", ["reroute", "drop"])
@pytest.mark.parametrize("k", [2, EXPERTS])
def test_a_large_budget_equals_the_exact_algorithms(rng, experts, k, overflow, record_property):
    x = rng.normal(size=(23, HIDDEN)).astype(np.float32)
    error = 0.0
    for logits in gatings(rng, 23).values():
        y, report = moe(
            experts.ours(), f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=k,
            algorithm="fixed_budget", tokens_per_expert_ratio=100.0, overflow=overflow,
            with_report=True,
        )  # fmt: skip
        expected = combine(x, *route(logits, k, Router()), experts)
        np.testing.assert_allclose(y.array, expected, rtol=5e-5, atol=5e-5)
        assert [int(v) for v in jax.tree.leaves(report)] == [23 * k, 0, 0, 0]
        error = max(error, float(np.abs(y.array - expected).max() / np.abs(expected).max()))
    record_property("row", "A4")
    record_property("with", "NumPy float64, room for all")
    record_property("error", error)


def test_fixed_budget_with_bias_and_before_top_k(rng, experts):
    """Selection by biased scores, weights by the unbiased ones."""
    x = rng.normal(size=(23, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(23, EXPERTS)).astype(np.float32)
    bias = np.array([0.4, 0, 0, -0.3, 0, 0])
    router = Router("sigmoid", "before_top_k", renormalize=True)
    expected = combine(x, *route(logits, K, router, bias), experts)
    for algorithm in (*EXACT, "fixed_budget"):
        y = moe(
            experts.ours(), f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=K,
            algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
            normalization=router, selection_bias=jnp.asarray(bias, jnp.float32),
        )  # fmt: skip
        np.testing.assert_allclose(y.array, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("algorithm", [*EXACT, "fixed_budget"])
def test_nan_shows_in_its_row_only(rng, experts, algorithm, record_property):
    record_property("bad_input", "NaN in x or in a logit")
    record_property("bad_input", "all -inf row")
    record_property("trap", "6")
    x = rng.normal(size=(6, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(6, EXPERTS)).astype(np.float32)
    call = functools.partial(
        moe, experts.ours(), experts_per_token=K, algorithm=algorithm,
        tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
    )  # fmt: skip
    clean = call(f32(x, "s", "d"), f32(logits, "s", "expert")).array
    x[1, 0], logits[4, 2] = np.nan, np.nan
    logits[3] = -np.inf
    y = np.asarray(call(f32(x, "s", "d"), f32(logits, "s", "expert")).array)
    np.testing.assert_array_equal(np.isnan(y).any(1), [False, True, False, False, True, False])
    np.testing.assert_array_equal(y[3], 0)
    np.testing.assert_allclose(y[[0, 2, 5]], clean[np.array([0, 2, 5])], rtol=1e-5, atol=1e-6)

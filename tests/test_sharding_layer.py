"""The layer on meshes: what one device would compute, whoever has the experts."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, combine, expert_choice, f32, route
from expert_mlp_oracle import Layer
from flax import nnx
from sharding_cases import (
    ALGORITHMS,
    CHOSEN,
    COMMUNICATIONS,
    EXPERTS,
    HIDDEN,
    TOLERANCE,
    BareAffine,
    Case,
    call,
    cases,
    experts,
    on_mesh,
    rounds,
)
from sharding_tools import MESHES, sharding

import moe_jax
from moe_jax import Router, Sharding, tag
from moe_jax.dispatch import token_budget

pytestmark = pytest.mark.usefixtures("little_compiling")

PAIRS = [
    (sizes, algorithm, COMMUNICATIONS[(m + a) % 2])
    for m, sizes in enumerate(MESHES)
    for a, algorithm in enumerate(ALGORITHMS)
]
"""Of meshes, algorithms and ways rows travel, each two that can meet."""


def test_pairs_are_complete():
    for one, other in itertools.combinations(range(3), 2):
        found = {(case[one], case[other]) for case in PAIRS}
        values = ({case[axis] for case in PAIRS} for axis in (one, other))
        assert found == set(itertools.product(*values))


@pytest.mark.parametrize(("sizes", "algorithm", "communication"), PAIRS, ids=str)
def test_every_mesh(sizes, algorithm, communication, record_property):
    """Tokens do not divide the mesh; whatever the routing, each pair counts once."""
    function = on_mesh(sharding(sizes, communication=communication), algorithm)
    error = 0.0
    for name, case in cases().items():
        y = call(function, case)
        np.testing.assert_allclose(y, case.expected, **TOLERANCE, err_msg=name)
        largest = max(1.0, np.nanmax(np.abs(case.expected)))
        error = max(error, float(np.nanmax(np.abs(y - case.expected)) / largest))
    record_property("row", "A5")
    record_property("with", "NumPy float64")
    record_property("error", error)


@pytest.mark.parametrize("sizes", [s for s in MESHES if s[1] * s[2] > max(1, s[0] // 2)], ids=str)
def test_the_cases_overflow(sizes):
    """Otherwise the test above would not see the rounds after the first on most meshes."""
    assert max(rounds(case.ids, sizes) for case in cases().values()) > 1


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9])
@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_few_tokens(tokens, communication):
    case = cases()["even"]
    few = Case(*(getattr(case, f.name)[:tokens] for f in dataclasses.fields(case)))
    function = on_mesh(sharding((2, 4, 1), communication=communication))
    np.testing.assert_allclose(call(function, few), few.expected, **TOLERANCE)


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_gradients(communication, rng):
    """Of experts, rows and weights, along one direction; with rounds after the first."""
    case, sizes = cases()["some_experts_get_none"], (2, 2, 2)
    assert rounds(case.ids, sizes) > 1
    direction = TinyExperts.random(rng, EXPERTS, HIDDEN, 7)
    along_x, along_w, along_y = (
        rng.normal(size=a.shape).astype(np.float32) for a in (case.x, case.weights, case.x)
    )

    def exact(step: float) -> float:
        moved = TinyExperts(
            *(getattr(experts(), n) + step * getattr(direction, n) for n in ("gate", "up", "down"))
        )
        x = case.x.astype(np.float64) + step * along_x
        weights = case.weights.astype(np.float64) + step * along_w
        return float((combine(x, case.ids, weights, moved) * along_y).sum())

    here = sharding(sizes, communication=communication)
    pairs = "s", "top_expert"
    ids = tag(jnp.asarray(case.ids, jnp.int32), *pairs)

    @jax.jit
    @jax.grad
    def gradient(values: Any) -> jax.Array:
        placed, x, weights = values
        y = moe_jax.fused_experts(x, ids, weights, placed, sharding=here)
        return (y.array * jnp.asarray(along_y)).sum()

    values = here.place(experts().ours()), f32(case.x, "s", "d"), f32(case.weights, *pairs)
    directions = direction.ours(), f32(along_x, "s", "d"), f32(along_w, *pairs)
    found = sum(
        float(np.vdot(np.asarray(g, np.float64), np.asarray(d, np.float64)))
        for g, d in zip(jax.tree.leaves(gradient(values)), jax.tree.leaves(directions), strict=True)
    )
    assert found == pytest.approx((exact(1e-5) - exact(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("layout", ["blocks", "tiles"])
@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_packed_experts(rng, layout, communication):
    """Rows are bfloat16: with tiles that is the layer which is kernels on GPUs."""
    layer = Layer.random(rng, 8, 64, 32)
    x = np.asarray(jnp.asarray(rng.normal(size=(45, 64)), jnp.bfloat16))
    ids, weights = rng.integers(-1, 8, (45, 3)), rng.random((45, 3)).astype(np.float32)
    here = sharding((1, 2, 2), communication=communication)
    ours = layer.ours() if layout == "blocks" else moe_jax.prepare_experts(layer.ours())
    y = jax.jit(lambda e: moe_jax.fused_experts(jnp.asarray(x), ids, weights, e, sharding=here))(
        here.place(ours)
    )
    expected = layer(x.astype(np.float64), ids, weights)
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert error.max() < 0.02 * np.abs(expected).max()
    assert error.mean() < 0.004 * np.abs(expected).max()


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 1)], ids=str)
def test_devices_route_for_their_own_experts(rng, sizes, communication):
    """With tiles each device routes rows itself, which do not divide the mesh; some are masked."""
    layer = Layer.random(rng, 8, 64, 32)
    x = np.asarray(jnp.asarray(rng.normal(size=(13, 64)), jnp.bfloat16))
    logits = rng.normal(size=(13, 8)).astype(np.float32)
    logits[2], logits[3, 1:] = -np.inf, -np.inf
    mask = rng.random(13) < 0.8
    here = sharding(sizes, communication=communication)

    def apply(experts, logits):
        return moe_jax.mixture_of_experts(
            experts, jnp.asarray(x), logits, experts_per_token=3, token_mask=mask, sharding=here
        )

    experts = here.place(moe_jax.prepare_experts(layer.ours()))
    expected = layer.routed(x.astype(np.float64), logits, 3, mask)
    error = np.abs(np.asarray(jax.jit(apply)(experts, logits), np.float64) - expected)
    assert error.max() < 0.02 * np.abs(expected).max()
    assert error.mean() < 0.004 * np.abs(expected).max()

    def total(logits):
        return apply(experts, logits).astype(jnp.float32).sum()

    found = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(logits)))
    finite = np.isfinite(logits)
    assert (found[~finite] == 0).all() and (found[~mask] == 0).all()
    for t, e in zip(*np.nonzero(finite & mask[:, None]), strict=True):
        step = np.zeros_like(logits, np.float64)
        step[t, e] = 1e-6
        up, down = (
            layer.routed(x.astype(np.float64), logits + s, 3, mask).sum() for s in (step, -step)
        )
        assert found[t, e] == pytest.approx((up - down) / 2e-6, abs=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("algorithm", ["auto", "per_token", "dense", "grouped"])
@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)], ids=str)
def test_routing_on_a_mesh(rng, algorithm, sizes):
    """Logits and a mask {b, s}, which does not divide the mesh."""
    x = rng.normal(size=(3, 11, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(3, 11, EXPERTS)).astype(np.float32)
    mask = rng.random((3, 11)) < 0.8
    here = sharding(sizes)
    y, report = jax.jit(
        lambda e: moe_jax.mixture_of_experts(
            e,
            f32(x, "b", "s", "d"),
            f32(logits, "b", "s", "expert"),
            experts_per_token=3,
            algorithm=algorithm,
            token_mask=tag(jnp.asarray(mask), "b", "s"),
            with_report=True,
            sharding=here,
        )
    )(here.place(experts().ours()))
    flat = x.reshape(-1, HIDDEN)
    ids, weights = route(logits.reshape(-1, EXPERTS), 3, Router())
    expected = combine(flat, np.where(mask.reshape(-1, 1), ids, -1), weights, experts())
    np.testing.assert_allclose(y.untag("b", "s", "d").reshape(-1, HIDDEN), expected, **TOLERANCE)
    assert int(report.assigned) == 3 * mask.sum() and int(report.dropped) == 0


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_fixed_budget_on_a_mesh(rng, overflow, communication):
    """A token with a logit that is NaN ranks that expert first and goes last; it gets NaN."""
    tokens, unknown = 65, 13
    logits = rng.normal(size=(tokens, EXPERTS)).astype(np.float32)
    logits[:, 2] += 2
    logits[unknown, 4] = np.nan
    x = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
    here = sharding((2, 4, 1), communication=communication)
    y, report = jax.jit(
        lambda e: moe_jax.mixture_of_experts(
            e,
            jnp.asarray(x),
            jnp.asarray(logits),
            experts_per_token=CHOSEN,
            tokens_per_expert_ratio=1.0,
            algorithm="fixed_budget",
            overflow=overflow,
            with_report=True,
            sharding=here,
        )
    )(here.place(experts().ours()))

    ranked = np.where(np.isnan(logits), np.inf, logits)
    priority = np.where(np.arange(tokens)[:, None] == unknown, -np.inf, _softmax(logits))
    budget = token_budget(tokens, EXPERTS, CHOSEN, 1.0)
    plan = expert_choice(ranked, priority, CHOSEN, budget, overflow)
    expected = np.zeros(x.shape)
    for t, kept in enumerate(plan.kept):
        for e, weight in zip(kept, _softmax(logits[t, kept]), strict=True):
            expected[t] += weight * experts()(e, x[t].astype(np.float64))
    expected[unknown] = np.nan
    np.testing.assert_allclose(y, expected, **TOLERANCE)
    assert plan.dropped > 0
    for name in ("assigned", "rerouted", "dropped", "empty_tokens"):
        assert int(getattr(report, name)) == getattr(plan, name), name


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64; NaN where a logit is."""
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def test_flax_layer(rng):
    here = sharding((2, 2, 2))
    weight = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    layer = moe_jax.MoE(
        here.place(experts().ours()),
        f32(weight, "expert", "d"),
        experts_per_token=3,
        sharding=here,
    )
    x = rng.normal(size=(29, HIDDEN)).astype(np.float32)
    ids, weights = route(x.astype(np.float64) @ weight.T.astype(np.float64), 3, Router())
    y = nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x))
    np.testing.assert_allclose(y, combine(x, ids, weights, experts()), **TOLERANCE)


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_any_expert(rng, communication):
    case = cases()["even"]
    scale, shift = rng.normal(size=(2, EXPERTS, HIDDEN))
    here = sharding((1, 4, 2), communication=communication)
    ours = BareAffine(jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
    y = jax.jit(
        lambda e: moe_jax.fused_experts(
            jnp.asarray(case.x), case.ids, case.weights, e, sharding=here
        )
    )(here.place(ours))
    expected = combine(case.x, case.ids, case.weights, lambda e, row: row * scale[e] + shift[e])
    np.testing.assert_allclose(y, expected, **TOLERANCE)


def test_other_names_of_mesh_axes(rng):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=axis_types)
    here = Sharding(mesh, {"b": "rows", "expert": "columns"}, communication="all_to_all")
    case = cases()["even"]
    np.testing.assert_allclose(call(on_mesh(here), case), case.expected, **TOLERANCE)


def test_experts_on_every_device_split_rows_only():
    mesh = moe_jax.make_mesh(data=4, expert=1)
    here = Sharding(mesh, {"b": "data"}, communication="psum")
    case = cases()["even"]
    np.testing.assert_allclose(call(on_mesh(here), case), case.expected, **TOLERANCE)


def test_experts_that_do_not_split():
    with pytest.raises(ValueError, match="axis 'expert' of size 6 cannot be split over 4 devices"):
        moe_jax.fused_experts(
            jnp.zeros((3, HIDDEN)),
            jnp.zeros((3, 1), jnp.int32),
            jnp.zeros((3, 1)),
            TinyExperts.random(np.random.default_rng(0), 6).ours(),
            sharding=sharding((1, 4, 1)),
        )


@pytest.mark.parametrize("wrong", [moe_jax.make_mesh, "expert"])
def test_sharding_of_another_type(wrong):
    given = wrong() if callable(wrong) else wrong
    with pytest.raises(TypeError, match=r"moe_jax.Sharding"):
        moe_jax.fused_experts(
            jnp.zeros((3, HIDDEN)),
            jnp.zeros((3, 1), jnp.int32),
            jnp.zeros((3, 1)),
            experts().ours(),
            sharding=given,
        )
    with pytest.raises(TypeError, match=r"moe_jax.Sharding"):
        moe_jax.MoE(
            experts().ours(),
            f32(np.zeros((EXPERTS, HIDDEN)), "expert", "d"),
            experts_per_token=1,
            sharding=given,
        )

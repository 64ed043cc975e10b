"""What the chosen experts leave of a token's weight goes to its x; the norm of the router's x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, combine, f32, moe, ratio_for, route, sigmoid
from flax import nnx

import moe_jax
from moe_jax import MoE, Norm, Router, Sharding, make_mesh

EXPERTS, HIDDEN, TOKENS = 8, 5, 11
BASE = Router(score="sigmoid")
ALGORITHMS = ["per_token", "dense", "grouped", "fixed_budget"]


@pytest.fixture
def parts(rng):
    experts = TinyExperts.random(rng, EXPERTS, HIDDEN)
    centroids = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    return experts, centroids, rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)


def expected_of(experts, logits, x, k=1, router=BASE):
    ids, weights = route(logits, k, router)
    y = combine(x, ids, weights, experts)
    return y + (1 - weights.sum(1, keepdims=True)) * x


def close(y, expected):
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm, k", [*((name, 1) for name in ALGORITHMS), ("dense", 3)])
def test_the_input_takes_what_the_weights_leave(parts, algorithm, k):
    experts, centroids, x = parts
    logits = (x.astype(np.float64) @ centroids.T).astype(np.float32)
    y = moe(
        experts.ours(), f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=k,
        normalization=BASE, algorithm=algorithm, remaining_weight="input",
        tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
    )  # fmt: skip
    close(y.array, expected_of(experts, logits, x, k))


@pytest.mark.parametrize("algorithm", ["grouped", "fixed_budget"])
def test_masked_tokens_are_zero_and_nan_stays_in_its_row(parts, algorithm):
    experts, centroids, x = parts
    logits = (x.astype(np.float64) @ centroids.T).astype(np.float32)
    expected = expected_of(experts, logits, x)
    keep = np.arange(TOKENS) != 4
    logits[4], logits[6, 2] = np.nan, np.nan
    expected[4], expected[6] = 0, np.nan
    y = moe(
        experts.ours(), x, logits, experts_per_token=1, normalization=BASE, algorithm=algorithm,
        remaining_weight="input", token_mask=keep,
        tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
    )  # fmt: skip
    close(y, expected)


def test_tokens_that_found_no_room_or_no_expert_keep_their_x(parts):
    experts, _, x = parts
    logits = np.zeros((TOKENS, EXPERTS), np.float32)
    y, report = moe(
        experts.ours(), x, logits, experts_per_token=1, normalization=BASE, overflow="drop",
        algorithm="fixed_budget", tokens_per_expert_ratio=0.1, remaining_weight="input",
        with_report=True,
    )  # fmt: skip
    assert int(report.dropped) == TOKENS - 8
    close(y[:8], expected_of(experts, logits, x)[:8])
    np.testing.assert_array_equal(y[8:], x[8:])
    logits[3] = -np.inf
    y = moe(
        experts.ours(), x, logits, experts_per_token=1, normalization=BASE, remaining_weight="input"
    )
    np.testing.assert_array_equal(y[3], x[3])


@pytest.mark.parametrize(
    "communication, algorithm", [("psum", "auto"), ("all_to_all", "fixed_budget")]
)
def test_spread_experts_give_the_same(parts, communication, algorithm):
    experts, centroids, x = parts
    here = Sharding(make_mesh(data=2, expert=4), communication=communication)
    layer = MoE(
        here.place(experts.ours()), f32(centroids, "expert", "d"), experts_per_token=1,
        router=BASE, remaining_weight="input", algorithm=algorithm, sharding=here,
        tokens_per_expert_ratio=ratio_for(algorithm, 100.0),
    )  # fmt: skip
    y = nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x))
    close(y, expected_of(experts, x.astype(np.float64) @ centroids.T, x))


def test_prerouted_pairs_that_add_nothing_have_no_weight(parts):
    experts, _, x = parts
    ids = np.array([[0, 3], [2, -1], [8, 99]] + [[1, 1]] * (TOKENS - 3), np.int32)
    scores = np.linspace(-1, 2, 2 * TOKENS, dtype=np.float32).reshape(TOKENS, 2)
    fused = jax.jit(moe_jax.fused_experts, static_argnames="remaining_weight")
    y = fused(x, ids, scores, experts.ours(), remaining_weight="input")
    used = np.where((ids >= 0) & (ids < EXPERTS), scores, 0)
    known = np.where(ids < EXPERTS, ids, -1)
    expected = combine(x, known, used, experts) + (1 - used.sum(1, keepdims=True)) * x
    close(y, expected)
    np.testing.assert_array_equal(y[2], x[2])


def test_centroids_learn_through_the_sigmoid_alone(parts):
    experts, centroids, x = parts
    layer = MoE(
        experts.ours(), f32(centroids, "expert", "d"), experts_per_token=1, router=BASE,
        remaining_weight="input", algorithm="dense",
    )  # fmt: skip
    gradient = nnx.jit(nnx.grad(lambda layer, x: layer(x).sum()))(layer, jnp.asarray(x))
    logits = x.astype(np.float64) @ centroids.T
    ids = logits.argmax(1)
    alpha = sigmoid(logits[np.arange(TOKENS), ids])
    moved = np.array(
        [experts(e, row) - row for e, row in zip(ids, x.astype(np.float64), strict=True)]
    ).sum(1)
    slope = (alpha * (1 - alpha) * moved)[:, None] * x
    expected = np.stack([slope[ids == e].sum(0) for e in range(EXPERTS)])
    np.testing.assert_allclose(
        gradient["router_weight"].get_value(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_router_alone_sees_the_norm_of_x(parts, rng, kind):
    experts, centroids, x = parts
    scale = rng.normal(size=HIDDEN).astype(np.float32)
    layer = MoE(
        experts.ours(), f32(centroids, "expert", "d"), experts_per_token=2,
        router_norm_weight=f32(scale, "d"), router_norm=Norm(kind, 0.01), algorithm="dense",
    )  # fmt: skip
    centred = x - x.mean(1, keepdims=True, dtype=np.float64) if kind == "layer" else x
    normed = scale * centred / np.sqrt((centred.astype(np.float64) ** 2).mean(1) + 0.01)[:, None]
    logits = normed @ centroids.T
    expected = combine(x, *route(logits, 2, Router()), experts)

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def run(layer, x):
        y = layer(x)
        return (y**2).sum(), y

    (_, y), gradient = run(layer, jnp.asarray(x))
    close(y, expected)
    close(layer.logits(f32(x, "s", "d")).array, logits)
    assert np.abs(gradient["router_norm_weight"].get_value()).max() > 0


def test_no_tokens(parts):
    experts, centroids, _ = parts
    layer = MoE(
        experts.ours(), f32(centroids, "expert", "d"), experts_per_token=1, router=BASE,
        remaining_weight="input", router_norm_weight=f32(np.ones(HIDDEN), "d"),
    )  # fmt: skip
    assert layer(jnp.zeros((0, HIDDEN))).shape == (0, HIDDEN)


def test_refuses(parts):
    experts, centroids, x = parts
    options = {"experts_per_token": 1}
    weight = f32(centroids, "expert", "d")
    message = "remaining_weight must be 'unused' or 'input', got 'expert'"
    with pytest.raises(ValueError, match=message):
        MoE(experts.ours(), weight, remaining_weight="expert", **options)
    with pytest.raises(ValueError, match=message):
        moe_jax.mixture_of_experts(
            experts.ours(), x, x @ centroids.T, remaining_weight="expert", **options
        )
    with pytest.raises(ValueError, match=message):
        ids = np.zeros((TOKENS, 1), np.int32)
        moe_jax.fused_experts(x, ids, ids * 1.0, experts.ours(), remaining_weight="expert")
    for wrong in (f32(np.ones(HIDDEN + 1), "d"), f32(np.ones(HIDDEN), "in")):
        with pytest.raises(ValueError, match=r"router_norm_weight must be {d=5}, got {"):
            MoE(experts.ours(), weight, router_norm_weight=wrong, **options)
    with pytest.raises(TypeError, match="router_norm must be a moe_jax.Norm, got 'rms'"):
        MoE(experts.ours(), weight, router_norm="rms", **options)

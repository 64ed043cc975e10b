"""The Flax module: gradients, optimizer steps, jit, packed experts, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core_oracle import TinyExperts, combine, f32, random_mxfp4, route
from flax import nnx

import moe_jax
from moe_jax import MoE, Router, tag
from moe_jax.variables import Fixed

EXPERTS, HIDDEN, TOKENS, K = 6, 5, 8, 2
GPT_OSS = Router()


@pytest.fixture
def parts(rng):
    experts = TinyExperts.random(rng, EXPERTS, HIDDEN)
    weight, bias = rng.normal(size=(EXPERTS, HIDDEN)), rng.normal(size=EXPERTS)
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    return experts, weight.astype(np.float32), bias.astype(np.float32), x


def layer_of(parts, **options) -> MoE:
    experts, weight, bias, _ = parts
    options = {"experts_per_token": K, **options}
    return MoE(experts.ours(), f32(weight, "expert", "d"), f32(bias, "expert"), **options)


def expected_of(parts, router=GPT_OSS, selection_bias=0.0):
    experts, weight, bias, x = parts
    logits = x.astype(np.float64) @ weight.T + bias
    return combine(x, *route(logits, K, router, selection_bias), experts)


def close(y, expected):
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_values(parts):
    x, expected = parts[3], expected_of(parts)
    layer = layer_of(parts)
    close(layer(f32(x.T, "d", "s")).untag("s", "d"), expected)
    close(layer(jnp.asarray(x)), expected)
    y = jax.jit(lambda m, v: m(v))(layer, jnp.asarray(x).reshape(2, 4, HIDDEN))
    close(y, expected.reshape(2, 4, HIDDEN))
    close(nnx.jit(lambda m, v: m(v))(layer, f32(x, "s", "d")).array, expected)


@pytest.mark.parametrize("algorithm", ["per_token", "dense", "grouped", "fixed_budget"])
def test_options_reach_the_dispatch(parts, algorithm):
    router = Router("sigmoid", "before_top_k", renormalize=True)
    bias = np.array([0.3, 0, 0, -0.3, 0, 0])
    ratio = 10.0 if algorithm == "fixed_budget" else None
    layer = layer_of(
        parts, algorithm=algorithm, tokens_per_expert_ratio=ratio, overflow="drop", router=router,
        selection_bias=f32(bias, "expert"),
    )  # fmt: skip
    close(layer(f32(parts[3], "s", "d")).array, expected_of(parts, router, bias))


def test_without_a_router_bias_the_rows_are_centroids(parts):
    experts, weight, _, x = parts
    layer = MoE(experts.ours(), f32(weight, "expert", "d"), experts_per_token=K)
    zero = (experts, weight, np.zeros(EXPERTS, np.float32), x)
    close(layer(f32(x, "s", "d")).array, expected_of(zero))


def test_gradients_reach_every_param(parts):
    layer = layer_of(parts)
    gradient = nnx.grad(lambda m: (m(jnp.asarray(parts[3])) ** 2).sum())(layer)
    assert set(gradient) == {"experts", "router_weight", "router_bias"}
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_an_optax_step_lowers_the_loss(parts):
    layer, x = layer_of(parts), jnp.asarray(parts[3])
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            y, statistics = nnx.merge(graph, params, rest).with_statistics(x)
            return ((y - x) ** 2).mean() + 0.01 * statistics.load_balance

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        for _ in range(20):
            params, state, value = step(params, state)
            losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    nnx.update(layer, params)
    assert layer(x).shape == x.shape


def test_flax_modules_as_experts_keep_their_own_params(parts):
    @nnx.split_rngs(splits=EXPERTS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)

    layer = MoE(make(nnx.Rngs(0)), f32(parts[1], "expert", "d"), experts_per_token=K)
    x = jnp.asarray(parts[3])
    assert isinstance(layer.experts, nnx.Linear)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    assert "kernel" in params["experts"]
    before = float((layer(x) ** 2).sum())
    gradient = jax.grad(lambda p: (nnx.merge(graph, p, rest)(x) ** 2).sum())(params)
    nnx.update(layer, optax.apply_updates(params, jax.tree.map(lambda g: -0.01 * g, gradient)))
    assert float((layer(x) ** 2).sum()) < 0.99 * before


def test_the_optimizer_of_flax_lowers_the_loss(parts):
    layer, x = layer_of(parts), jnp.asarray(parts[3])
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        value, gradient = nnx.value_and_grad(lambda m: ((m(x) - x) ** 2).mean())(layer)
        optimizer.update(layer, gradient)
        return value

    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        losses = [float(step(layer, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_selection_bias_is_left_to_its_owner(parts):
    layer = layer_of(parts, selection_bias=f32(np.zeros(EXPERTS), "expert"))
    assert isinstance(layer.selection_bias, Fixed)
    assert "selection_bias" not in nnx.state(layer, nnx.Param)


def test_packed_weights_are_fixed_and_their_biases_train(rng):
    gate_up, up_values = random_mxfp4(rng, EXPERTS, 64, 2)
    down, down_values = random_mxfp4(rng, EXPERTS, 64, 1)
    b1, b2 = rng.normal(size=(2, EXPERTS, 64)).astype(np.float32)
    packed = moe_jax.GptOssMLP(gate_up, f32(b1, "expert", "out"), down, f32(b2, "expert", "out"))
    weight = rng.normal(size=(EXPERTS, 64)).astype(np.float32)
    layer = MoE(packed, f32(weight, "expert", "d"), experts_per_token=K)
    held = layer.experts.leaves
    fixed = {name for name, variable in held.items() if isinstance(variable, Fixed)}
    assert fixed == {"gate_up.blocks", "gate_up.scales", "down.blocks", "down.scales"}
    x = f32(rng.normal(size=(TOKENS, 64)), "s", "d")
    gradient = jax.jit(nnx.grad(lambda m, v: m(v).map(jnp.square).sum("s").sum("d").array))(
        layer, x
    )
    assert set(gradient) == {"router_weight", "experts"}
    assert set(gradient["experts"]["leaves"]) == {"gate_up_bias", "down_bias"}
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradient))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))

    def one(e, row):
        h = up_values[e] @ row + b1[e]
        gate, up = np.minimum(h[0::2], 7), np.clip(h[1::2], -7, 7)
        return down_values[e] @ (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) + b2[e]

    x64 = np.asarray(x.array, np.float64)
    expected = combine(x64, *route(x64 @ weight.T, K, Router()), one)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(layer(x).array / scale, expected / scale, atol=1e-5)


def test_statistics(parts):
    x = parts[3]
    keep = np.arange(TOKENS) != 2
    layer = layer_of(parts, algorithm="fixed_budget", tokens_per_expert_ratio=0.1, overflow="drop")
    spoiled = np.where(keep[:, None], x, np.float32(np.nan))
    y, statistics = layer.with_statistics(jnp.asarray(spoiled), token_mask=jnp.asarray(keep))
    logits = f32((x.astype(np.float64) @ parts[1].T + parts[2])[keep], "s", "expert")
    routing = moe_jax.route(logits, K)
    balance = moe_jax.load_balance_loss(logits, routing)
    np.testing.assert_allclose(statistics.load_balance, balance, rtol=1e-4)
    np.testing.assert_allclose(statistics.z, moe_jax.router_z_loss(logits), rtol=1e-4)
    report = statistics.report
    assert int(report.assigned) + int(report.dropped) == K * keep.sum()
    np.testing.assert_array_equal(y[2], 0)


def test_padding_with_nan_does_not_reach_the_gradients(parts):
    x = np.array(parts[3])
    x[3] = np.nan
    mask = tag(jnp.arange(TOKENS) != 3, "s")

    def loss(layer):
        y, statistics = layer.with_statistics(f32(x, "s", "d"), token_mask=mask)
        return (y * y).sum("s").sum("d").array + statistics.load_balance + statistics.z

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(layer_of(parts))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"algorithm": "sparse"}, "algorithm must be 'auto' or one of"),
        ({"algorithm": "fixed_budget"}, "needs tokens_per_expert_ratio, got None"),
        ({"tokens_per_expert_ratio": 0.0}, "must be a positive number, got 0.0"),
        ({"algorithm": "dense", "tokens_per_expert_ratio": 2.0}, "'dense' computes every chosen"),
        ({"router": Router(num_groups=4)}, "num_groups=4 must divide the number of experts 6"),
        ({"overflow": "spill"}, "overflow must be 'reroute' or 'drop', got 'spill'"),
    ],
)
def test_refuses_options_when_it_is_made(parts, options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(parts, **options)


def test_refuses(parts):
    experts, weight, bias, _ = parts
    with pytest.raises(ValueError, match="router_weight must have the axes {expert, d}, got"):
        MoE(experts.ours(), f32(weight, "expert", "in"), experts_per_token=K)
    with pytest.raises(ValueError, match="between 1 and the number of experts 6, got 9"):
        layer_of(parts, experts_per_token=9)
    with pytest.raises(ValueError, match="holds 6 experts, the gating has 5"):
        MoE(experts.ours(), f32(weight[:5], "expert", "d"), experts_per_token=K)
    with pytest.raises(ValueError, match="axis 'd' has different sizes"):
        layer_of(parts)(jnp.ones((3, HIDDEN + 1)))
    with pytest.raises(ValueError, match="x needs at least two axes"):
        layer_of(parts)(jnp.ones(HIDDEN))
    with pytest.raises(ValueError, match="router_bias must be {expert=6}, got {expert=3}"):
        MoE(
            experts.ours(), f32(weight, "expert", "d"), f32(bias[:3], "expert"), experts_per_token=K
        )
    with pytest.raises(ValueError, match="selection_bias must be {expert=6}, got {expert=3}"):
        layer_of(parts, selection_bias=f32(bias[:3], "expert"))
    with pytest.raises(TypeError, match="router must be a Router, got 'linear'"):
        layer_of(parts, router="linear")

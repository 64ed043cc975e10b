"""Expert layers against NumPy float64, by every way of dispatch and as single experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import (
    clamped_swiglu,
    combine,
    f32,
    gelu,
    gelu_tanh,
    moe,
    random_mxfp4,
    ratio_for,
    softmax,
    weight,
)

import moe_jax
from moe_jax import Activation, Norm, transforms
from moe_jax.experts.base import check_experts

EXPERTS, HIDDEN, WIDE = 4, 5, 3
ALGORITHMS = ["per_token", "dense", "grouped", "fixed_budget"]


def draw(rng, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


def gpt_oss(rng):
    up, down = draw(rng, EXPERTS, 2 * WIDE, HIDDEN) * 3, draw(rng, EXPERTS, HIDDEN, WIDE)
    b1, b2 = draw(rng, EXPERTS, 2 * WIDE), draw(rng, EXPERTS, HIDDEN)
    layer = moe_jax.GptOssMLP(
        weight(up), f32(b1, "expert", "out"), weight(down), f32(b2, "expert", "out")
    )

    def one(e, row):
        h = up[e] @ row + b1[e]
        return down[e] @ clamped_swiglu(h[0::2], h[1::2], 1.702, 1.0, 7.0) + b2[e]

    return layer, one


def packed(rng):
    """Packed gate and up, with 64 inputs; see `HIDDENS`."""
    gate_up, values = random_mxfp4(rng, EXPERTS, 64, 2)
    down, down_values = random_mxfp4(rng, EXPERTS, 64, 1)
    b1, b2 = draw(rng, EXPERTS, 64), draw(rng, EXPERTS, 64)
    layer = moe_jax.GptOssMLP(gate_up, f32(b1, "expert", "out"), down, f32(b2, "expert", "out"))

    def one(e, row):
        h = values[e] @ row + b1[e]
        return down_values[e] @ clamped_swiglu(h[0::2], h[1::2], 1.702, 1.0, 7.0) + b2[e]

    return layer, one


def mlp(rng):
    up, down = draw(rng, EXPERTS, WIDE, HIDDEN), draw(rng, EXPERTS, HIDDEN, WIDE)
    b1, b2 = draw(rng, EXPERTS, WIDE), draw(rng, EXPERTS, HIDDEN)
    layer = moe_jax.MLP(
        weight(up), weight(down), f32(b1, "expert", "out"), f32(b2.T, "out", "expert")
    )
    return layer, lambda e, row: down[e] @ gelu(up[e] @ row + b1[e]) + b2[e]


def fused_mlp(rng):
    up, down = draw(rng, EXPERTS, 2 * WIDE, HIDDEN), draw(rng, EXPERTS, HIDDEN, WIDE)
    layer = moe_jax.MLP(
        weight(up).order("in", "expert", "out"), weight(down), activation=Activation("geglu")
    )

    def one(e, row):
        h = up[e] @ row
        return down[e] @ (gelu(h[:WIDE]) * h[WIDE:])

    return layer, one


def gated(rng):
    gate, up = draw(rng, EXPERTS, WIDE, HIDDEN), draw(rng, EXPERTS, WIDE, HIDDEN)
    down = draw(rng, EXPERTS, HIDDEN, WIDE)
    b1, b2, b3 = draw(rng, EXPERTS, WIDE), draw(rng, EXPERTS, WIDE), draw(rng, EXPERTS, HIDDEN)
    layer = moe_jax.GatedMLP(
        weight(gate), weight(up), weight(down),
        *(f32(b, "expert", "out") for b in (b1, b2, b3)),
    )  # fmt: skip
    return (
        layer,
        lambda e, row: down[e] @ clamped_swiglu(gate[e] @ row + b1[e], up[e] @ row + b2[e]) + b3[e],
    )


def identity(rng):
    return moe_jax.Identity(), lambda e, row: row


def t5(rng):
    scale, gate, up = draw(rng, EXPERTS, HIDDEN), *draw(rng, 2, EXPERTS, WIDE, HIDDEN)
    down = draw(rng, EXPERTS, HIDDEN, WIDE)
    layer = moe_jax.T5FeedForward(f32(scale.T, "d", "expert"), *map(weight, (gate, up, down)))

    def one(e, row):
        normed = scale[e] * row / np.sqrt((row**2).mean() + 1e-6)
        return row + down[e] @ (gelu_tanh(gate[e] @ normed) * (up[e] @ normed))

    return layer, one


def t5_layer_norm(rng):
    layer, _ = t5(rng)
    bias = draw(rng, EXPERTS, HIDDEN)
    layer = dataclasses.replace(
        layer, norm_bias=f32(bias, "expert", "d"), norm=Norm("layer", 0.1),
        activation=Activation("geglu"),
    )  # fmt: skip
    scale, *weights = (
        np.asarray(w.untag(*axes), np.float64)
        for w, axes in [(layer.norm_weight, ("expert", "d"))]
        + [(w, ("expert", "out", "in")) for w in (layer.wi_0, layer.wi_1, layer.wo)]
    )

    def one(e, row):
        gate, up, down = (w[e] for w in weights)
        normed = scale[e] * (row - row.mean()) / np.sqrt(row.var() + 0.1) + bias[e]
        return row + down @ (gelu(gate @ normed) * (up @ normed))

    return layer, one


LAYERS = {
    f.__name__: f for f in (gpt_oss, packed, mlp, fused_mlp, gated, identity, t5, t5_layer_norm)
}
HIDDENS = {"packed": 64}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(rng, name, algorithm):
    layer, one = LAYERS[name](rng)
    x = draw(rng, 6, HIDDENS.get(name, HIDDEN))
    logits = draw(rng, 6, EXPERTS)
    ids = np.argsort(-logits, 1)[:, :2]
    expected = combine(x, ids, softmax(np.take_along_axis(logits, ids, 1)), one)
    y = moe(
        layer, f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=2,
        algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
    )  # fmt: skip
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(y.array, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "identity"])
def test_a_layer_is_also_a_single_expert(rng, name):
    layer, one = LAYERS[name](rng)
    x = draw(rng, 6, HIDDENS.get(name, HIDDEN))
    y = transforms.vmap(lambda expert: expert(f32(x, "s", "d")), "expert")(layer)
    assert y.axes == ("expert", "s", "d")
    bare = transforms.vmap(lambda expert: expert(jnp.asarray(x, jnp.float32)), "expert")(layer)
    for e in range(EXPERTS):
        expected = np.stack([one(e, row) for row in x])
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(y.array[e], expected, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(bare[e], y.array[e], rtol=1e-6)


def test_random_experts_have_the_documented_size():
    layer = moe_jax.GatedMLP.random(jax.random.key(0), 8, 64, 48)
    assert layer.up.sizes == layer.gate.sizes == {"expert": 8, "out": 48, "in": 64}
    assert layer.down.sizes == {"expert": 8, "out": 64, "in": 48}
    for w in (layer.gate, layer.up, layer.down):
        np.testing.assert_allclose(float(w.array.std()), w.size("in") ** -0.5, rtol=0.05)
    assert not np.array_equal(layer.gate.array, layer.up.array)


def test_weights_take_the_dtype_of_the_rows(rng):
    layer, one = gpt_oss(rng)
    x = draw(rng, 3, HIDDEN)
    low, gating = f32(x, "s", "d").astype(jnp.bfloat16), f32(np.zeros((3, EXPERTS)), "s", "expert")
    for algorithm in ALGORITHMS:
        y = moe(
            layer, low, gating, experts_per_token=1, algorithm=algorithm,
            tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
        )  # fmt: skip
        expected = np.stack([one(0, row) for row in x])
        assert y.dtype == jnp.bfloat16
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(y.array, np.float64) / scale, expected / scale, atol=0.03
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sizes_and_names_that_do_not_fit(rng, algorithm, record_property):
    record_property("bad_input", "fused width odd")
    record_property("bad_input", "sizes, names or dtypes")
    layer, _ = gpt_oss(rng)

    def call(experts):
        return moe(
            experts, f32(np.ones((6, HIDDEN)), "s", "d"), f32(np.ones((6, EXPERTS)), "s", "expert"),
            experts_per_token=2, algorithm=algorithm,
            tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
        )  # fmt: skip

    wrong_in = f32(np.ones((EXPERTS, 2 * WIDE, HIDDEN + 1)), "expert", "out", "in")
    with pytest.raises(ValueError, match="axis 'in' has different sizes"):
        call(dataclasses.replace(layer, gate_up=wrong_in))
    swapped = layer.down.rename(out="in", **{"in": "out"})
    with pytest.raises(ValueError, match="axis 'in' has different sizes"):
        call(dataclasses.replace(layer, down=swapped))
    with pytest.raises(ValueError, match="axis 'out' has different sizes|neither of"):
        call(dataclasses.replace(layer, down_bias=layer.gate_up_bias))
    with pytest.raises(ValueError, match="neither of|expected the axes|no axis"):
        call(dataclasses.replace(layer, down_bias=layer.down_bias.rename(out="in")))
    odd = f32(np.ones((EXPERTS, 5, HIDDEN)), "expert", "out", "in")
    bias = f32(np.ones((EXPERTS, 5)), "expert", "out")
    with pytest.raises(ValueError, match="needs an even size of axis 'out', got 5"):
        call(dataclasses.replace(layer, gate_up=odd, gate_up_bias=bias))


def test_check_experts_names_what_is_wrong(rng):
    layer, _ = gpt_oss(rng)
    check_experts(layer, EXPERTS)
    with pytest.raises(ValueError, match=r"experts.gate_up holds 4 experts, the gating has 5"):
        check_experts(layer, EXPERTS + 1)
    with pytest.raises(ValueError, match="no axis 'expert' among {e, out}"):
        check_experts(
            dataclasses.replace(layer, down_bias=layer.down_bias.rename(expert="e")), EXPERTS
        )


def test_an_expert_must_define_apply():
    class Nothing(moe_jax.Expert):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must define apply"):
        Nothing()(jnp.ones((2, 3)))


@pytest.mark.parametrize("missing", ["up_bias", "down_bias"])
def test_refuses_some_biases_without_the_others(missing, record_property):
    record_property("bad_input", "biases partly given")
    bias = {"up_bias": f32(np.ones((3, 4)), "expert", "out")}
    bias["down_bias"] = f32(np.ones((3, 5)), "expert", "out")
    layer = moe_jax.MLP(
        f32(np.ones((3, 4, 5)), "expert", "out", "in"),
        f32(np.ones((3, 5, 4)), "expert", "out", "in"),
        **{**bias, missing: None},
    )
    with pytest.raises(ValueError, match=f"expected all of up_bias, down_bias or none.*{missing}"):
        moe_jax.mixture_of_experts(layer, jnp.ones((2, 5)), jnp.ones((2, 3)), experts_per_token=2)

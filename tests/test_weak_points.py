"""Mistakes of an earlier expert-choice layer, each of which must not come back.

Every test states the mistake and would fail where it is made.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import (
    TinyExperts,
    expert_choice,
    f32,
    moe,
    random_mxfp4,
    ratio_for,
    softmax,
    weight,
)
from jax.sharding import AxisType

import moe_jax
from moe_jax import Activation, Router, Tagged, mixture_of_experts, tag
from moe_jax.dispatch import plan_fixed_budget, token_budget
from moe_jax.routing import LINEAR_ROUTER

SIZES = {"tokens": 512, "experts": 32, "k": 4}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant:
    """Returns its value for every row: the layer then returns the sum of weights x values."""

    value: Tagged

    def __call__(self, x: Tagged) -> Tagged:
        return x * 0 + self.value.astype(x.dtype)


def ones(experts: int) -> Constant:
    return Constant(f32(np.ones(experts), "expert"))


def plan_of(logits, k=4, ratio=2.0, **options):
    tokens, experts = logits.shape
    budget = token_budget(tokens, experts, k, ratio)
    return plan_fixed_budget(f32(logits, "s", "expert"), k, budget, Router(), **options)


def weight_sums(logits, k=4, **options) -> np.ndarray:
    """The sum of the weights that each token's experts got."""
    x = f32(np.ones((len(logits), 1)), "s", "d")
    gating = f32(logits, "s", "expert")
    return np.asarray(
        moe(
            ones(logits.shape[1]),
            x,
            gating,
            experts_per_token=k,
            algorithm="fixed_budget",
            **options,
        ).array[:, 0]
    )


@pytest.fixture
def fixed_budget(record_property) -> None:
    record_property("row", "A4")
    record_property("with", "regressions by hand")


@pytest.fixture
def logits(rng) -> np.ndarray:
    return (3 * rng.normal(size=(512, 32))).astype(np.float32)


@pytest.mark.usefixtures("fixed_budget")
def test_z01_priority_comes_from_probabilities_not_from_powers_of_raw_logits(logits):
    """Powers of raw logits kept the best expert for no token at all."""
    plan = plan_of(logits)
    best = logits.argmax(1)
    first = np.asarray(plan.ids.array[:, 0])
    assert (first == best)[np.asarray(plan.valid.array[:, 0])].mean() > 0.99
    kept = np.asarray(plan.valid.array & (plan.ids.array == jnp.argsort(-logits, 1)[:, :4])).mean()
    assert kept > 0.9


@pytest.mark.usefixtures("fixed_budget")
@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_z02_weights_sum_to_one_over_the_experts_kept(logits, overflow):
    """Experts not chosen held logit 0, and exp(0) = 1 took weight from those chosen."""
    skewed = logits + 0.5 * np.arange(32, dtype=np.float32)[None]
    totals = weight_sums(skewed, tokens_per_expert_ratio=1.0, overflow=overflow)
    nothing = totals == 0
    np.testing.assert_allclose(totals[~nothing], 1.0, rtol=1e-5)
    assert 0 < nothing.sum() < 512
    plan = plan_of(skewed, ratio=1.0, overflow=overflow)
    assert plan.ids.size("top_expert") == 4
    assert int(plan.report.empty_tokens) == nothing.sum()


@pytest.mark.usefixtures("fixed_budget")
def test_z03_chosen_experts_with_negative_logits_are_kept(logits):
    """Negative chosen logits ranked below the zeros of experts not chosen."""
    negative = -np.abs(logits) - 1
    plan = plan_of(negative, ratio=100.0)
    np.testing.assert_array_equal(plan.ids.array, np.argsort(-negative, 1, kind="stable")[:, :4])
    assert bool(plan.valid.array.all())


@pytest.mark.usefixtures("fixed_budget")
def test_z04_linear_normalization_without_anything_left_is_zero_not_nan():
    """0 / 0 for a token that every expert refused; negative gating is refused by NaN."""
    gating = np.tile(np.array([[3.0, 1.0, 0, 0]], np.float32), (32, 1))
    totals = weight_sums(
        gating, 2, normalization=LINEAR_ROUTER, tokens_per_expert_ratio=0.5, overflow="drop"
    )
    np.testing.assert_allclose(np.sort(totals), [0] * 24 + [1] * 8, rtol=1e-6)
    zero = np.zeros((9, 4), np.float32)
    assert (
        weight_sums(zero, 2, normalization=LINEAR_ROUTER, tokens_per_expert_ratio=9.0) == 0
    ).all()
    negative = np.array([[2.0, -1.0]], np.float32)
    total = weight_sums(negative, 2, normalization=LINEAR_ROUTER, tokens_per_expert_ratio=9.0)
    assert np.isnan(total).all()


@pytest.mark.usefixtures("fixed_budget")
def test_z05_the_default_drops_nothing_and_a_ratio_of_zero_is_refused(rng, record_property):
    """The default ratio 0 gave a budget of 0 tokens."""
    record_property("bad_input", "budget ratio")
    collapsed = np.tile(np.eye(1, 8, dtype=np.float32) * 9, (100, 1))
    x, gating = f32(np.ones((100, 1)), "s", "d"), f32(collapsed, "s", "expert")
    y, report = moe(ones(8), x, gating, experts_per_token=2, with_report=True)
    np.testing.assert_allclose(y.array, 1.0, rtol=1e-6)
    assert [int(v) for v in jax.tree.leaves(report)] == [200, 0, 0, 0]
    with pytest.raises(ValueError, match="must be a positive number, got 0.0"):
        moe(ones(8), x, gating, experts_per_token=2, tokens_per_expert_ratio=0.0)


@pytest.mark.usefixtures("fixed_budget")
def test_z06_the_budget_is_never_below_what_was_asked():
    """0.65 x 100 x 4 / 32 = 8.125 was floored to 8 before it was rounded up."""
    assert token_budget(100, 32, 4, 0.65) == 16


@pytest.mark.usefixtures("fixed_budget")
def test_z07_as_many_experts_a_token_as_there_are(logits):
    """Pruning to the lowest experts - k = 0 entries failed."""
    totals = weight_sums(logits[:40, :4], 4, tokens_per_expert_ratio=9.0)
    np.testing.assert_allclose(totals, 1.0, rtol=1e-5)


@pytest.mark.usefixtures("fixed_budget")
def test_z08_rerouting_is_a_policy_is_counted_and_is_not_the_default(rng, logits):
    """Tokens went to worse experts without notice, and depended on tokens after them."""
    skewed = logits + np.arange(32, dtype=np.float32)[None]
    for overflow in ("reroute", "drop"):
        report = plan_of(skewed, ratio=1.0, overflow=overflow).report
        priority = softmax(skewed).astype(np.float32)
        expected = expert_choice(skewed, priority, 4, 64, overflow)
        counts = [expected.assigned, expected.rerouted, expected.dropped, expected.empty_tokens]
        assert [int(v) for v in jax.tree.leaves(report)] == counts
        assert expected.dropped > 500 and (expected.rerouted > 500) == (overflow == "reroute")

    experts = TinyExperts.random(rng, 32, 5).ours()
    x = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)
    call = functools.partial(moe, experts, experts_per_token=4)
    gating = jnp.asarray(skewed[:40])
    later = jnp.concatenate([gating[:20], -gating[20:]])
    np.testing.assert_allclose(call(x, gating)[:20], call(x, later)[:20], rtol=1e-5, atol=1e-6)
    budget = functools.partial(call, algorithm="fixed_budget", tokens_per_expert_ratio=0.5)
    assert np.abs(budget(x, gating)[:20] - budget(x, later)[:20]).max() > 0.01


@pytest.mark.usefixtures("fixed_budget")
def test_z09_padding_takes_no_room():
    """Padding tokens took the slots of real ones."""
    gating = np.zeros((32, 4), np.float32)
    gating[:, 0] = np.linspace(9, 5, 32)
    real = np.arange(32) >= 24
    mask = tag(jnp.asarray(real), "s")
    options = {"tokens_per_expert_ratio": 1.0, "overflow": "drop"}
    totals = weight_sums(gating, 1, token_mask=mask, **options)
    np.testing.assert_allclose(totals, real.astype(float), rtol=1e-6)
    assert not weight_sums(gating, 1, **options)[real].any()
    plan = plan_of(gating, 1, 1.0, token_mask=mask, overflow="drop")
    assert [int(v) for v in jax.tree.leaves(plan.report)] == [8, 0, 0, 0]


@pytest.mark.parametrize("algorithm", ["per_token", "dense", "grouped", "fixed_budget"])
def test_z10_no_host_callback_is_left_in_the_program(rng, algorithm):
    """A print left in the all-to-all path synchronised with the host in every layer."""
    experts = TinyExperts.random(rng, 4, 5).ours()
    call = functools.partial(
        mixture_of_experts, experts, experts_per_token=2, algorithm=algorithm,
        tokens_per_expert_ratio=ratio_for(algorithm, 1.0), with_report=True,
    )  # fmt: skip
    text = jax.jit(call).lower(jnp.ones((9, 5)), jnp.ones((9, 4))).as_text()
    for word in ("callback", "outfeed", "infeed", "stablehlo.send"):
        assert word not in text
    control = jax.jit(lambda a: jax.debug.print("{}", a)).lower(jnp.ones(3)).as_text()
    assert "callback" in control


def test_z11_input_and_output_axes_have_names_of_their_own(rng, record_property):
    """A bias of the outputs carried the name of the inputs, and equal sizes hid the swap."""
    record_property("row", "N1")
    record_property("with", "unit tests")
    n = 5
    square = weight(rng.normal(size=(4, n, n)))
    bias = f32(rng.normal(size=(4, n)), "expert", "out")
    x, gating = f32(np.ones((9, n)), "s", "d"), f32(np.eye(9, 4), "s", "expert")
    good = moe_jax.MLP(square, square, bias, bias)
    for algorithm in ("per_token", "dense", "grouped", "fixed_budget"):
        call = functools.partial(
            moe, x=x, gating=gating, experts_per_token=2, algorithm=algorithm,
            tokens_per_expert_ratio=ratio_for(algorithm, 9.0),
        )  # fmt: skip
        assert call(good).axes == ("s", "d")
        for wrong in ("d", "in"):
            bad = dataclasses.replace(good, up_bias=bias.rename(out=wrong))
            with pytest.raises(ValueError, match="neither of|expected the axes|no axis"):
                call(bad)


def test_z12_alpha_beta_and_limit_are_attributes():
    """1.702 and 7 were written into the code."""
    x = f32(np.array([[9.0, 9.0, 0.5, -9.0]]), "s", "out")
    for alpha, beta, limit in ((1.702, 1.0, 7.0), (1.0, 0.0, 3.0), (0.5, 2.0, 100.0)):
        gate, up = np.minimum([9.0, 0.5], limit), np.clip([9.0, -9.0], -limit, limit)
        expected = gate / (1 + np.exp(-alpha * gate)) * (up + beta)
        layer = Activation("swiglu", alpha, beta, limit, "interleaved")
        np.testing.assert_allclose(layer(x).array[0], expected, rtol=1e-5)


def test_z13_shapes_are_those_that_the_documentation_states(rng):
    """Comments called the output of `down` 2 x hidden, and 16 bytes a block of 32."""
    hidden, wide = 64, 32
    gate_up, _ = random_mxfp4(rng, 4, 2 * wide, hidden // 32)
    down, _ = random_mxfp4(rng, 4, hidden, wide // 32)
    assert gate_up.sizes == {"expert": 4, "out": 2 * wide, "in": hidden}
    assert down.sizes == {"expert": 4, "out": hidden, "in": wide}
    assert gate_up.blocks.sizes == {"expert": 4, "out": 2 * wide, "block": 2, "byte": 16}
    assert gate_up.scales.sizes == {"expert": 4, "out": 2 * wide, "block": 2}
    b1, b2 = (
        f32(np.ones((4, 2 * wide)), "expert", "out"),
        f32(np.ones((4, hidden)), "expert", "out"),
    )
    layer = moe_jax.GptOssMLP(gate_up, b1, down, b2)
    x, gating = f32(np.ones((3, hidden)), "s", "d"), f32(np.eye(3, 4), "s", "expert")
    assert moe(layer, x, gating, experts_per_token=2).sizes == x.sizes


@pytest.mark.parametrize("tokens", [1, 3, 24])
def test_z14_blocks_scales_and_biases_of_an_expert_are_sharded_together(
    rng, tokens, record_property
):
    """Only the blocks were sharded over the experts."""
    gate_up, _ = random_mxfp4(rng, 8, 64, 2)
    down, _ = random_mxfp4(rng, 8, 64, 1)
    b1, b2 = (f32(rng.normal(size=(8, 64)), "expert", "out") for _ in range(2))
    layer = moe_jax.GptOssMLP(gate_up, b1, down, b2)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    sharded = jax.tree.map(
        lambda leaf: leaf.partition(mesh, {"expert": "devices"}),
        layer,
        is_leaf=moe_jax.tagged.is_tagged,
    )
    leaves = jax.tree.leaves(sharded)
    assert len(leaves) == 6
    assert all(leaf.addressable_shards[0].data.shape[0] == 1 for leaf in leaves)
    x = f32(rng.normal(size=(tokens, 64)), "s", "d")
    gating = f32(rng.normal(size=(tokens, 8)), "s", "expert")
    call = functools.partial(moe, experts_per_token=2)
    expected = call(layer, x, gating).array
    error = float(np.abs(call(sharded, x, gating).array - expected).max() / np.abs(expected).max())
    record_property("row", "A5")
    record_property("with", "one device, MXFP4 with biases")
    record_property("error", error)
    assert error < 1e-5


def test_z15_scales_are_not_cast_to_the_dtype_of_the_activations():
    """2^-126 and 2^127 became 0 and infinity in float16 before they met their codes."""
    codes = np.full((1, 1, 1, 16), 0x11, np.uint8)
    for scale, expected in ((112, 2.0**-16), (104, 2.0**-24), (142, 2.0**14), (143, 2.0**15)):
        packed = moe_jax.BlockScaled(
            tag(jnp.asarray(codes), "expert", "out", "block", "byte"),
            tag(jnp.full((1, 1, 1), scale, jnp.uint8), "expert", "out", "block"),
        )
        for dtype in (jnp.float16, jnp.float32, jnp.bfloat16):
            value = packed.dequantize(dtype).array
            assert value.dtype == dtype and (np.asarray(value, np.float64) == expected).all()


@pytest.mark.parametrize("algorithm", ["per_token", "dense", "grouped", "fixed_budget"])
def test_z16_outputs_of_experts_are_summed_in_float32(algorithm):
    """1 + 8 x 2^-9: a sum kept in bfloat16 stays at 1."""
    values = np.full(9, 2.0**-9)
    values[0] = 1.0
    experts = Constant(f32(9 * values, "expert"))
    x = tag(jnp.ones((2, 1), jnp.bfloat16), "s", "d")
    y = moe(
        experts, x, f32(np.zeros((2, 9)), "s", "expert"), experts_per_token=9,
        algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 9.0),
    )  # fmt: skip
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y.array, np.float64), 1 + 2.0**-6)


def test_z17_one_token_has_one_path_whatever_the_number_of_its_experts(rng):
    """The path of a single token unrolled a gather of whole experts for each one chosen."""
    experts = TinyExperts.random(rng, 16, 5).ours()

    def operations(k: int) -> int:
        call = functools.partial(mixture_of_experts, experts, experts_per_token=k)
        text = jax.jit(call).lower(jnp.ones((1, 5)), jnp.ones((1, 16))).as_text()
        return text.count("stablehlo.")

    assert operations(2) == operations(4) == operations(15)

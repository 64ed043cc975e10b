"""Packed weights of every format are weights of experts: every algorithm, meshes, Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import clamped_swiglu, combine, f32, moe, ratio_for, softmax
from sharding_tools import sharding

import moe_jax
from moe_jax import GatedMLP, MoE, transforms
from moe_jax.quantization import quantize_integers, quantize_nvfp4
from moe_jax.variables import Fixed

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 48, 32, 6
FORMATS = {
    "gate": quantize_nvfp4,
    "up": lambda w: quantize_integers(w, 4, 16, zero_points=True),
    "down": lambda w: quantize_integers(w, 2),
}
LEAVES = {
    *("gate.blocks", "gate.scales", "gate.global_scale"),
    *("up.codes", "up.scales", "up.zero_points", "down.codes", "down.scales"),
}


@functools.cache
def packed_layer():
    """Experts with a matrix of each format, and the same with the decoded floats."""
    rng = np.random.default_rng(5)
    shapes = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN)}
    shapes["down"] = HIDDEN, INTERMEDIATE
    weights = {
        name: jax.jit(quantize)(
            f32(rng.normal(size=(EXPERTS, *shapes[name])) * 0.2, "expert", "out", "in")
        )
        for name, quantize in FORMATS.items()
    }
    decode = jax.jit(lambda w: w.dequantize(jnp.float32))
    return GatedMLP(**weights), GatedMLP(**{n: decode(w) for n, w in weights.items()})


def one(e, row):
    gate, up, down = (
        np.asarray(w.array, np.float64)
        for w in (packed_layer()[1].gate, packed_layer()[1].up, packed_layer()[1].down)
    )
    return down[e] @ clamped_swiglu(gate[e] @ row, up[e] @ row)


def inputs(rng):
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    ids = np.argsort(-logits, 1)[:, :2]
    return x, logits, ids, softmax(np.take_along_axis(logits, ids, 1))


@pytest.mark.parametrize("algorithm", ["per_token", "dense", "grouped", "fixed_budget"])
def test_every_algorithm(rng, algorithm):
    x, logits, ids, weights = inputs(rng)
    y = moe(
        packed_layer()[0], f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=2,
        algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
    )  # fmt: skip
    np.testing.assert_allclose(y.array, combine(x, ids, weights, one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("communication", ["psum", "all_to_all"])
def test_on_a_mesh(rng, communication):
    x, _, ids, weights = inputs(rng)
    here = sharding((1, 2, 1), communication=communication)
    placed = here.place(packed_layer()[0])
    leaves = jax.tree.leaves(placed)
    assert len(leaves) == len(LEAVES)
    assert all(leaf.addressable_shards[0].data.shape[0] == EXPERTS // 2 for leaf in leaves)
    function = jax.jit(
        lambda *args: moe_jax.fused_experts(*args, algorithm="grouped", sharding=here),
        compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time
    )
    y = function(x, ids.astype(np.int32), weights.astype(np.float32), placed)
    np.testing.assert_allclose(y, combine(x, ids, weights, one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["dense", "grouped"])
def test_gradients_reach_rows_and_no_weight(rng, algorithm):
    x, logits, _, _ = inputs(rng)

    def gradients(layer, algorithm):
        def loss(x, layer):
            return (moe(layer, x, logits, experts_per_token=2, algorithm=algorithm) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1), allow_int=True))(jnp.asarray(x), layer)

    packed, floats = packed_layer()
    got, expected = gradients(packed, algorithm), gradients(floats, "dense")
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(got[1]):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


def test_as_flax_variables_and_as_a_single_expert(rng):
    layer, (x, _, _, _) = packed_layer()[0], inputs(rng)
    module = MoE(layer, f32(rng.normal(size=(EXPERTS, HIDDEN)), "expert", "d"), experts_per_token=2)
    assert {type(leaf) for leaf in module.experts.leaves.values()} == {Fixed}
    assert set(module.experts.leaves) == LEAVES
    call = jax.jit(transforms.vmap(lambda expert: expert(f32(x, "s", "d")), "expert"))
    expected = np.stack([[one(e, row) for row in x] for e in range(EXPERTS)])
    np.testing.assert_allclose(call(layer).array, expected, atol=1e-5)
    assert moe_jax.prepare_experts(layer).gate is layer.gate


def test_the_number_of_experts_is_checked():
    with pytest.raises(ValueError, match="gate.blocks.* holds 4 experts, the gating has 5"):
        moe(packed_layer()[0], jnp.ones((3, HIDDEN)), jnp.ones((3, 5)), experts_per_token=2)

"""Packed weights of every format are weights of experts: every algorithm, meshes, Flax."""

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

ALGORITHMS = ("per_token", "dense", "grouped", "fixed_budget")
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 64, 32, 6
FORMATS = {
    "nvfp4": quantize_nvfp4,
    "int4_groups": lambda w: quantize_integers(w, 4, 16, zero_points=True),
    "int8_rows": lambda w: quantize_integers(w, 8),
    "int2_groups": lambda w: quantize_integers(w, 2, 32),
}


def packed_layer(rng, name):
    """Experts with packed weights, and what they compute, in float64 from the decoded numbers."""

    def weight(outputs, inputs):
        w = rng.normal(size=(EXPERTS, outputs, inputs)) / np.sqrt(inputs)
        return FORMATS[name](f32(w, "expert", "out", "in"))

    layer = GatedMLP(
        weight(INTERMEDIATE, HIDDEN), weight(INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE)
    )
    gate, up, down = (
        np.asarray(w.dequantize(jnp.float32).array, np.float64)
        for w in (layer.gate, layer.up, layer.down)
    )
    return layer, lambda e, row: down[e] @ clamped_swiglu(gate[e] @ row, up[e] @ row)


def inputs(rng):
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    ids = np.argsort(-logits, 1)[:, :2]
    return x, logits, ids, softmax(np.take_along_axis(logits, ids, 1))


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [(name, algorithm) for name in ("nvfp4", "int4_groups") for algorithm in ALGORITHMS]
    + [("int8_rows", "per_token"), ("int2_groups", "grouped")],
)
def test_every_algorithm(rng, name, algorithm):
    layer, one = packed_layer(rng, name)
    x, logits, ids, weights = inputs(rng)
    y = moe(
        layer, f32(x, "s", "d"), f32(logits, "s", "expert"), experts_per_token=2,
        algorithm=algorithm, tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
    )  # fmt: skip
    np.testing.assert_allclose(y.array, combine(x, ids, weights, one), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "communication"), [("nvfp4", "psum"), ("int4_groups", "all_to_all")]
)
def test_on_a_mesh(rng, name, communication):
    layer, one = packed_layer(rng, name)
    x, _, ids, weights = inputs(rng)
    here = sharding((1, 2, 1), communication=communication)
    placed = here.place(layer)
    leaves = jax.tree.leaves(placed)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in leaves)
    assert all(leaf.addressable_shards[0].data.shape[0] == EXPERTS // 2 for leaf in leaves)
    function = jax.jit(
        lambda *args: moe_jax.fused_experts(*args, algorithm="grouped", sharding=here),
        compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time
    )
    y = function(x, ids.astype(np.int32), weights.astype(np.float32), placed)
    np.testing.assert_allclose(y, combine(x, ids, weights, one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["nvfp4", "int4_groups"])
def test_gradients_reach_rows_and_no_weight(rng, name):
    layer, _ = packed_layer(rng, name)
    x, logits, _, _ = inputs(rng)
    floats = GatedMLP(*(w.dequantize(jnp.float32) for w in (layer.gate, layer.up, layer.down)))

    def gradients(layer, algorithm):
        def loss(x, layer):
            return (moe(layer, x, logits, experts_per_token=2, algorithm=algorithm) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1), allow_int=True))(jnp.asarray(x), layer)

    for algorithm in ("dense", "grouped"):
        got, expected = gradients(layer, algorithm), gradients(floats, algorithm)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-5)
        for leaf in jax.tree.leaves(got[1]):
            assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


def test_as_flax_variables_and_as_a_single_expert(rng):
    layer, one = packed_layer(rng, "int4_groups")
    x = inputs(rng)[0]
    router = f32(rng.normal(size=(EXPERTS, HIDDEN)), "expert", "d")
    module = MoE(layer, router, experts_per_token=2)
    assert {type(leaf) for leaf in module.experts.leaves.values()} == {Fixed}
    assert set(module.experts.leaves) == {
        f"{w}.{leaf}" for w in ("gate", "up", "down") for leaf in ("codes", "scales", "zero_points")
    }
    np.testing.assert_allclose(
        module(x), moe(layer, x, x @ router.array.T, experts_per_token=2), atol=1e-5
    )
    y = transforms.vmap(lambda expert: expert(f32(x, "s", "d")), "expert")(layer)
    expected = np.stack([[one(e, row) for row in x] for e in range(EXPERTS)])
    np.testing.assert_allclose(y.array, expected, atol=1e-5)
    assert moe_jax.prepare_experts(layer).gate is layer.gate


def test_the_number_of_experts_is_checked(rng):
    layer, _ = packed_layer(rng, "nvfp4")
    with pytest.raises(ValueError, match="gate.blocks.* holds 4 experts, the gating has 5"):
        moe(layer, jnp.ones((3, HIDDEN)), jnp.ones((3, 5)), experts_per_token=2)

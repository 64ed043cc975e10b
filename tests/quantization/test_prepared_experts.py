"""Experts prepared for the GPU give the results of those they were made of, wherever they go."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import assert_same, f32, moe, random_mxfp4, ratio_for
from flax import nnx
from jax.sharding import AxisType

import moe_jax
from moe_jax import BlockScaled, GptOssMLP, MoE, Tagged, TiledMXFP4, tag, tile_mxfp4
from moe_jax.kernels.grouped_matmul import grouped_matmul
from moe_jax.quantization import is_packed
from moe_jax.variables import Fixed

pytestmark = pytest.mark.usefixtures("little_compiling")

ALGORITHMS = ("per_token", "dense", "grouped", "fixed_budget")
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 8, 64, 96, 12


def experts_of(rng) -> Any:
    """Packed experts with biases."""

    def packed_part(outputs: int, blocks: int) -> BlockScaled:
        return jax.tree.map(jnp.asarray, random_mxfp4(rng, EXPERTS, outputs, blocks)[0])

    return GptOssMLP(
        packed_part(2 * INTERMEDIATE, HIDDEN // 32),
        f32(rng.normal(size=(EXPERTS, 2 * INTERMEDIATE)), "expert", "out"),
        packed_part(HIDDEN, INTERMEDIATE // 32),
        f32(rng.normal(size=(EXPERTS, HIDDEN)), "expert", "out"),
    )


def rows_and_logits(rng) -> tuple[jax.Array, jax.Array]:
    x, logits = rng.normal(size=(TOKENS, HIDDEN)), rng.normal(size=(TOKENS, EXPERTS))
    return jnp.asarray(x, jnp.float32), jnp.asarray(logits, jnp.float32)


class TestPrepareExperts:
    def test_tiles_packed_weights_and_leaves_the_rest(self, rng):
        experts = experts_of(rng)
        other = BlockScaled(
            tag(np.zeros((4, 2, 16), "u1"), "voc", "block", "byte"),
            tag(np.zeros((4, 2), "u1"), "voc", "block"),
        )
        turned = BlockScaled(
            experts.down.blocks.order("out", "expert", "block", "byte"),
            experts.down.scales.order("out", "expert", "block"),
        )
        tree = {"layers": [experts, (turned, None)], "table": other, "bare": jnp.ones(3)}
        prepared = moe_jax.prepare_experts(tree)
        first, (second, nothing) = prepared["layers"]
        assert isinstance(first.gate_up, TiledMXFP4) and isinstance(first.down, TiledMXFP4)
        assert first.gate_up_bias.array is experts.gate_up_bias.array and nothing is None
        assert prepared["table"] is other and prepared["bare"] is tree["bare"]
        assert second.axes == ("expert", "out", "in")
        assert_same(second.untile(), experts.down)
        again = moe_jax.prepare_experts(prepared)
        assert again["layers"][0].gate_up is first.gate_up
        assert_same(moe_jax.restore_experts(first), experts)
        assert_same(jax.jit(moe_jax.prepare_experts)(experts), first)

    def test_packed_variables_are_refused(self, rng):
        layer = MoE(
            experts_of(rng), f32(np.ones((EXPERTS, HIDDEN)), "expert", "d"), experts_per_token=2
        )
        for function in (moe_jax.prepare_experts, moe_jax.restore_experts):
            with pytest.raises(TypeError, match="before they go into the module"):
                function({"mlp": layer})
        linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        assert moe_jax.prepare_experts(linear) is linear

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_same_results_and_gradients_in_every_algorithm(self, rng, algorithm, dtype):
        experts = experts_of(rng)
        x, logits = rows_and_logits(rng)
        x = x.astype(dtype)

        def loss(x, experts):
            y = moe(
                experts,
                x,
                logits,
                experts_per_token=2,
                algorithm=algorithm,
                tokens_per_expert_ratio=ratio_for(algorithm, 1.0),
            )
            return (y * y).sum(), y

        function = jax.jit(jax.grad(loss, has_aux=True))
        expected = function(x, experts)
        assert float(jnp.abs(expected[1].astype(jnp.float32)).max()) > 0
        assert_same(function(x, moe_jax.prepare_experts(experts)), expected)

    def test_experts_on_several_devices(self, rng):
        experts = experts_of(rng)
        x, logits = rows_and_logits(rng)
        mesh = jax.make_mesh((8,), ("e",), axis_types=(AxisType.Auto,))
        spread = jax.tree.map(
            lambda leaf: leaf.partition(mesh, {"expert": "e"}),
            experts,
            is_leaf=lambda node: is_packed(node) or isinstance(node, Tagged),
        )
        prepared = moe_jax.prepare_experts(spread)
        assert len(prepared.gate_up.words.array.sharding.device_set) == 8
        results = [
            moe(e, x, logits, experts_per_token=2, algorithm="grouped") for e in (experts, prepared)
        ]
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-5)

    def test_grouped_matmul_decodes_one_expert_at_a_time(self, rng):
        weight = tile_mxfp4(random_mxfp4(rng, 16, 128, 4)[0])
        rows = f32(rng.normal(size=(32, 128)), "row", "in")
        sizes = tag(jnp.full(16, 2, jnp.int32), "expert")
        function = jax.jit(lambda *args: grouped_matmul(*args).array)
        memory: Any = function.lower(rows, weight, sizes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * 16 * 128 * 128 / 2

    def test_one_expert_alone(self, rng):
        up = random_mxfp4(rng, 1, 96, 2)[0].take(0, "expert")
        down = random_mxfp4(rng, 1, 64, 3)[0].take(0, "expert")
        x = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
        tiled = moe_jax.MLP(tile_mxfp4(up), tile_mxfp4(down))
        np.testing.assert_array_equal(tiled(x), moe_jax.MLP(up, down)(x))


class TestLayer:
    def make(self, rng, prepare=lambda experts: experts) -> MoE:
        experts = prepare(experts_of(rng))
        router = f32(rng.normal(size=(EXPERTS, HIDDEN)), "expert", "d")
        return MoE(experts, router, experts_per_token=2)

    def test_same_results_and_nothing_of_a_weight_is_trained(self, rng, request):
        again = np.random.default_rng(list(request.node.name.encode()))
        plain, prepared = self.make(rng), self.make(again, moe_jax.prepare_experts)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, HIDDEN)), jnp.float32)
        np.testing.assert_array_equal(prepared(x), plain(x))
        experts: Any = prepared.experts
        kinds = {name: type(leaf) for name, leaf in experts.leaves.items()}
        fixed = {name for name, kind in kinds.items() if kind is Fixed}
        assert fixed == {
            f"{weight}.{leaf}"
            for weight in ("gate_up", "down")
            for leaf in ("words", "scales", "offset", "factor")
        }
        gradients = [
            nnx.grad(lambda m: (m(x) ** 2).sum())(layer)["router_weight"].get_value()
            for layer in (plain, prepared)
        ]
        np.testing.assert_array_equal(gradients[1], gradients[0])

    def test_the_number_of_experts_is_checked(self, rng):
        experts = moe_jax.prepare_experts(experts_of(rng))
        with pytest.raises(ValueError, match="gate_up.words.* holds 8 experts, the gating has 7"):
            moe(
                experts,
                jnp.ones((3, HIDDEN)),
                jnp.ones((3, 7)),
                experts_per_token=2,
            )

"""Meshes, the rules by which arrays lie on them, and the choice of communication."""

import copy
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, random_mxfp4
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sharding_tools import MESHES, bytes_by_device, sharding

import moe_jax
from moe_jax import Sharding, choose_communication, make_mesh, tag
from moe_jax.sharding.communication import capacity

P = PartitionSpec


class TestMakeMesh:
    @pytest.mark.parametrize("sizes", MESHES, ids=str)
    def test_sizes_and_axis_types(self, sizes):
        mesh = sharding(sizes).mesh
        assert dict(mesh.shape) == dict(zip(("data", "expert", "model"), sizes, strict=True))
        assert set(mesh.axis_types) == {AxisType.Auto}
        assert len(set(mesh.devices.flat)) == math.prod(sizes)

    def test_experts_get_the_devices_that_are_left(self):
        assert make_mesh().shape["expert"] == 8
        assert make_mesh(data=2, model=2).shape["expert"] == 2
        assert make_mesh(devices=jax.devices()[:3]).shape["expert"] == 3

    def test_takes_the_devices_that_are_given(self):
        devices = jax.devices()[5:7]
        assert set(make_mesh(devices=devices).devices.flat) == set(devices)

    @pytest.mark.parametrize(
        "sizes, message",
        [
            ({"data": 3}, r"'data' of size 3 .* 8 devices: .* 1, 2, 4 or 8$"),
            ({"data": 2, "model": 3}, r"'model' of size 3 .* 8 devices in 2 parts: .* 1, 2 or 4$"),
            ({"expert": 16}, r"needs 16 devices, there are 8: for axis 'expert' at most 8"),
            ({"expert": 4, "data": 4}, r"needs 16 devices, there are 8: for axis 'data' at most 2"),
            ({"expert": 9, "data": 9}, r"needs 81 .* for axis 'data' make another axis smaller"),
            ({"model": 0}, r"'model' must have a size of at least 1, got 0"),
            ({"expert": 2.0}, r"'expert' must have a size of at least 1, got 2.0"),
        ],
        ids=str,
    )
    def test_sizes_that_do_not_fit(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            make_mesh(**sizes)


class TestSharding:
    def test_wants_automatic_axes(self):
        with pytest.raises(ValueError, match="mesh axis 'data' is AxisType.Explicit.*make_mesh"):
            Sharding(jax.make_mesh((1, 8, 1), ("data", "expert", "model")))

    def test_wants_the_axes_of_its_rules(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        with pytest.raises(ValueError, match=r"'b' to mesh axis 'data', the mesh has \('x',\)"):
            Sharding(mesh)
        assert Sharding(mesh, {"expert": "x"}).axes("expert") == ("x",)

    def test_wants_a_mesh(self):
        with pytest.raises(TypeError, match="mesh must be"):
            Sharding(jax.devices())

    def test_wants_a_known_communication(self):
        with pytest.raises(ValueError, match="'psum', 'all_to_all'.*, got 'ring'"):
            sharding((1, 8, 1), communication="ring")

    def test_equal_ones_compile_once(self):
        first, second = sharding((2, 2, 2)), sharding((2, 2, 2))
        assert first == second and hash(first) == hash(second)
        assert first != Sharding(first.mesh, {"expert": "expert"})

    def test_rules_are_a_copy(self):
        """Otherwise a change would go unnoticed by what is compiled already."""
        rules: dict[str, Any] = {"expert": ["expert", "model"], "b": None}
        here = sharding((1, 4, 2), rules=rules)
        before = hash(here)
        rules["expert"] = "data"
        assert here.axes("expert") == ("expert", "model") and hash(here) == before
        assert here.rules == {"b": None, "expert": ("expert", "model")}

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
    def test_rules_can_be_copied_and_pickled(self, copied):
        rules = sharding((1, 4, 2), rules={"expert": ("expert", "model"), "b": None}).rules
        again = copied(rules)
        assert again == rules and hash(again) == hash(rules) and type(again) is type(rules)
        assert copied(moe_jax.SHARDING_RULES) == moe_jax.SHARDING_RULES

    def test_a_copy_compiles_nothing_new(self):
        here = sharding((1, 4, 2))
        again = copy.deepcopy(here)
        assert again == here and hash(again) == hash(here)

    def test_the_hash_tells_rules_apart(self):
        """In whatever order they are."""
        one, other = {"b": "data", "expert": "model"}, {"expert": "model", "b": "data"}
        first, second = (sharding((1, 4, 2), rules=rules) for rules in (one, other))
        assert first == second and hash(first) == hash(second)
        assert hash(first) != hash(sharding((1, 4, 2), rules={"b": "data"}))

    @pytest.mark.parametrize(
        "rules", [None, "expert", {"expert": 3}, {"expert": ("model", 3)}], ids=str
    )
    def test_rules_of_another_type(self, rules):
        with pytest.raises(TypeError, match="rules must map|rule of axis 'expert' must be"):
            sharding((1, 4, 2), rules=rules)

    def test_all_parts_of_experts_follow_one_rule(self, rng):
        """Blocks, scales, tiles and biases are split by experts, whatever else they are."""
        packed, _ = random_mxfp4(rng, 4, 16, 2)
        experts = {
            "floats": tag(jnp.zeros((3, 4, 5)), "out", "expert", "in"),
            "bias": tag(jnp.zeros((4, 3)), "expert", "out"),
            "blocks": packed,
            "tiles": moe_jax.tile_mxfp4(packed),
            "bare": jnp.zeros((4, 7)),
        }
        here = sharding((2, 2, 2))
        found = here.of(experts)
        assert jax.tree.structure(found) == jax.tree.structure(experts)
        assert found["floats"].array == NamedSharding(here.mesh, P(None, ("expert", "model"), None))
        placed = here.place(experts)
        for path, leaf in jax.tree.leaves_with_path(placed):
            assert {s.data.nbytes * 4 for s in leaf.addressable_shards} == {leaf.nbytes}, path
        for ours, whole in zip(jax.tree.leaves(placed), jax.tree.leaves(experts), strict=True):
            np.testing.assert_array_equal(ours, whole)

    def test_inputs_of_a_packed_weight_split_at_blocks(self, rng):
        packed, _ = random_mxfp4(rng, 3, 16, 4)
        here = Sharding(make_mesh(), {"in": "model", "out": "expert"})
        assert here.of(packed).blocks.array.spec == P(None, "expert", "model", None)
        assert here.of(packed).scales.array.spec == P(None, "expert", "model")
        with pytest.raises(ValueError, match=r"words.*'tile_out' of size 1"):
            here.of(moe_jax.tile_mxfp4(packed))

    def test_abstract_arrays(self):
        experts = jax.eval_shape(lambda: moe_jax.GatedMLP.random(jax.random.key(0), 8, 3, 5))
        assert sharding((1, 4, 2)).of(experts).gate.array.spec == P(("expert", "model"), None, None)

    def test_experts_that_do_not_split(self, rng):
        experts = TinyExperts.random(rng, num_experts=6).ours()
        with pytest.raises(ValueError) as caught:
            sharding((1, 4, 1)).of({"mlp": experts})
        message = str(caught.value)
        assert "['mlp'].gate {expert=6, out=7, in=5}" in message
        assert (
            "axis 'expert' of size 6 cannot be split over 4 devices (expert=4, model=1)" in message
        )
        assert "1, 2, 3 or 6 would do" in message

    @pytest.mark.parametrize("sizes", MESHES, ids=str)
    def test_a_device_holds_its_share_of_expert_bytes(self, rng, sizes):
        experts = TinyExperts.random(rng, num_experts=8).ours()
        held = bytes_by_device(sharding(sizes).place(experts))
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
        assert len(held) == math.prod(sizes)
        assert set(held.values()) == {total // (sizes[1] * sizes[2])}

    def test_constrain_splits_as_far_as_it_goes(self):
        here = sharding((2, 2, 2))

        def rows(batch):
            x = tag(jnp.zeros((batch, 3, 5)), "b", "s", "d")
            return jax.jit(here.constrain)(x).array.sharding.shard_shape(x.shape)[0]

        assert [rows(batch) for batch in (1, 2, 3, 4, 6, 8)] == [1, 1, 3, 1, 3, 2]

    def test_constrain_splits_the_vocabulary_before_the_batch(self):
        x = tag(jnp.zeros((8, 20)), "b", "voc")
        rules = {"b": ("data", "expert"), "voc": ("expert", "model")}
        where = jax.jit(sharding((2, 2, 2), rules=rules).constrain)(x).array.sharding
        assert where.shard_shape(x.shape) == (4, 5)


class TestChoice:
    def test_few_tokens_are_summed_and_many_exchanged(self):
        for devices in (2, 4, 8, 64):
            assert choose_communication(1, devices, 4) == "psum"
            assert choose_communication(512, devices, 4) == "psum"
        assert choose_communication(1 << 20, 8, 4) == "all_to_all"

    @pytest.mark.parametrize(("devices", "k"), [(2, 4), (4, 64), (8, 4)])
    def test_the_exchange_begins_where_it_sends_less(self, devices, k):
        """In bytes: sums are float32, rows bfloat16; to start the exchange costs 16,000 rows."""

        def saved(tokens):
            summed = 4 * 2 * (devices - 1) / devices * tokens
            each = 2 * (devices - 1) * capacity(tokens // devices, devices, k)
            return summed - 2 * (each + 16_000)

        for tokens in (2**n for n in range(10, 21)):
            expected = "all_to_all" if saved(tokens) > 0 else "psum"
            assert choose_communication(tokens, devices, k) == expected

    def test_one_device_has_nothing_to_exchange(self):
        assert choose_communication(1 << 20, 1, 4) == "psum"

    @given(st.integers(2, 600), st.integers(1, 16))
    def test_more_tokens_never_change_back(self, devices, k):
        choices = [choose_communication(1 << n, devices, k) for n in range(22)]
        assert choices == sorted(choices, reverse=True)

    @given(st.integers(1, 10**6), st.integers(1, 600), st.integers(1, 128))
    def test_capacity_is_the_mean_and_a_quarter_but_no_more_than_all(self, tokens, devices, k):
        room = capacity(tokens, devices, k)
        mean = tokens * (1 - (1 - 1 / devices) ** k)
        assert 1 <= room <= tokens
        assert room == tokens or 1.25 * mean <= room <= 1.25 * mean + 8

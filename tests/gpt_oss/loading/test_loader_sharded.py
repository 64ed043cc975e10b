"""Loading onto several devices: each reads only its slices, and the whole is that of one."""

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec
from loader_files import NAME, bits, read

from gpt_oss import loader
from gpt_oss.config import GptOssConfig
from moe_jax.checkpoint import Checkpoint, CheckpointError
from moe_jax.sharding import Sharding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose axes all divide by 8; not to be damaged."""
    return tiny.write("divisible_by_8", tmp_path_factory.mktemp("sharded"))


class TestSharded:
    RULES = {"expert": "e", "out": "m", "h_hd": "m", "kv_hd": "m", "voc": ("e", "m")}

    @pytest.fixture
    def mesh(self):
        return jax.make_mesh((4, 2), ("e", "m"), axis_types=(AxisType.Auto,) * 2)

    @pytest.mark.parametrize(
        "rules", [RULES, {}, {"in": "e", "expert": "m", "d": "e"}, {"voc": None, "h": "e"}]
    )
    def test_equal_to_one_device(self, folder, mesh, rules):
        config = GptOssConfig.from_folder(folder)
        whole = read(folder, config)
        split = read(folder, config, place=loader.place_sharded(Sharding(mesh, rules)))
        for name, value in whole.items():
            for one, many in zip(jax.tree.leaves(value), jax.tree.leaves(split[name]), strict=True):
                assert len(many.sharding.device_set) == 8
                np.testing.assert_array_equal(bits(one), bits(many))

    def test_every_byte_is_read_once(self, folder, mesh, monkeypatch):
        counted = []
        real = Checkpoint.read

        def counting(self, name, index=()):
            array = real(self, name, index)
            counted.append(array.nbytes)
            return array

        monkeypatch.setattr(Checkpoint, "read", counting)
        config = GptOssConfig.from_folder(folder)
        parameters = read(folder, config, place=loader.place_sharded(Sharding(mesh, self.RULES)))
        assert sum(counted) == Checkpoint.open(folder).nbytes
        experts = parameters["model.layers.0.mlp.experts.down_proj"]
        assert experts.blocks.array.sharding.spec == PartitionSpec("e", "m", None, None)
        assert experts.scales.array.sharding.spec == PartitionSpec("e", "m", None)
        # no single read is larger than what one device holds of the largest tensor
        table = parameters["lm_head.weight"].array
        assert max(counted) <= max(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(parameters)
        )
        assert table.addressable_shards[0].data.nbytes * 8 == table.nbytes

    def test_blocks_and_scales_follow_the_rule_of_in(self, folder, mesh):
        place = loader.place_sharded(Sharding(mesh, {"in": "e"}))
        experts = read(folder, GptOssConfig.from_folder(folder), place=place)[
            "model.layers.0.mlp.experts.down_proj"
        ]
        assert experts.blocks.array.sharding.spec == PartitionSpec(None, None, "e", None)
        assert experts.scales.array.sharding.spec == PartitionSpec(None, None, "e")

    def test_float_experts_by_slices(self, tmp_path, mesh, rng):
        folder = tmp_path
        source = tiny.tensors("divisible_by_8")
        name = "model.layers.1.mlp.experts.gate_up_proj"
        experts, rows, blocks, _ = source.pop(name + "_blocks").shape
        del source[name + "_scales"]
        weight = rng.standard_normal((experts, rows, blocks * 32)).astype(ml_dtypes.bfloat16)
        source[name] = np.ascontiguousarray(weight.swapaxes(1, 2)).view(np.uint16)
        tiny.write_files(folder, tiny.config("divisible_by_8"), source)
        parameters = read(
            folder,
            GptOssConfig.from_folder(folder),
            place=loader.place_sharded(Sharding(mesh, {"out": "e", "in": "m"})),
        )
        np.testing.assert_array_equal(np.asarray(parameters[name].array), weight)

    def test_mesh_that_does_not_divide(self, tmp_path, mesh):
        tiny.write(NAME, tmp_path)
        with pytest.raises(ValueError, match="size 7 cannot be split over 4 devices"):
            loader.load_model(tmp_path, sharding=Sharding(mesh, {"expert": "e"}))

    def test_bad_value_is_placed_in_the_whole_tensor(self, tmp_path, mesh):
        source = tiny.tensors("divisible_by_8")
        name = "model.layers.1.mlp.experts.down_proj_scales"
        source[name] = source[name].copy()
        source[name][13, 200, 5] = 255
        tiny.write_files(tmp_path, tiny.config("divisible_by_8"), source)
        config = GptOssConfig.from_folder(tmp_path)
        with pytest.raises(CheckpointError, match=rf"{name}: a scale byte .* at \[13, 200, 5\]"):
            read(
                tmp_path,
                config,
                place=loader.place_sharded(Sharding(mesh, {"expert": "e", "in": "m"})),
            )

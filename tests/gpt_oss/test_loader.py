"""Loading: bit for bit what is on disk, each device only its slices, and damage always an error."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import save_file

from benchmarks import sparse_checkpoint
from gpt_oss import loader
from gpt_oss.config import GptOssConfig
from gpt_oss.layout import parameter_specs
from moe_jax.checkpoint import Checkpoint, CheckpointError, ConfigError
from moe_jax.quantization import BlockScaled
from moe_jax.sharding import Sharding

NAME = "released_numbers"
LAYER = "model.layers.2."
KINDS = [
    *(
        f"{LAYER}self_attn.{part}_proj.{kind}"
        for part in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    ),
    *(f"{LAYER}{name}_layernorm.weight" for name in ("input", "post_attention")),
    f"{LAYER}self_attn.sinks",
    f"{LAYER}mlp.router.weight",
    f"{LAYER}mlp.router.bias",
    *(
        f"{LAYER}mlp.experts.{part}_proj_{kind}"
        for part in ("gate_up", "down")
        for kind in ("blocks", "scales", "bias")
    ),
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
]
"""One tensor of each of the 22 kinds."""

BLOCKS, SCALES = KINDS[13], KINDS[14]
EXPERTS = f"{LAYER}mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def config():
    return GptOssConfig.from_dict(tiny.config(NAME))


@pytest.fixture(scope="module")
def originals():
    """The tiny checkpoint with the dtypes that it has on disk."""
    return {
        key: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
        for key, array in tiny.tensors(NAME).items()
    }


@pytest.fixture
def tensors(originals):
    """A copy of the dictionary, for a test to damage."""
    return dict(originals)


def write(folder, tensors):
    """One file, so that the index cannot be what is complained about."""
    (folder / "config.json").write_text(json.dumps(tiny.config(NAME)))
    save_file(
        {key: np.ascontiguousarray(array) for key, array in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def read(folder, config, **options):
    return loader.read_parameters(Checkpoint.open(folder), config, **options)


def fails(folder, tensors, config, *patterns):
    """Loading fails with one error whose lines match the patterns, before any array is placed."""
    write(folder, tensors)

    def place(source):
        raise AssertionError(f"{source.name} was placed")

    with pytest.raises(CheckpointError) as caught:
        read(folder, config, place=place)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    return str(caught.value)


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


def assert_is_on_disk(parameters, originals):
    """Parameters have the very bytes of the tensors."""
    seen = set()
    for name, value in parameters.items():
        if isinstance(value, BlockScaled):
            pairs = {name + "_blocks": value.blocks, name + "_scales": value.scales}
        else:
            pairs = {name: value}
        for key, leaf in pairs.items():
            seen.add(key)
            np.testing.assert_array_equal(bits(leaf.array), bits(originals[key]))
    assert seen == originals.keys()


class TestLayout:
    def test_is_that_of_the_released_files(self, config):
        expected = {key: shape for key, (_, shape) in tiny.shapes(tiny.config(NAME)).items()}
        got = {}
        for name, spec in parameter_specs(config).items():
            assert name == spec.name and len(spec.axes) == len(spec.shape)
            *lead, columns = spec.shape
            if spec.is_expert_weight:
                got[name + "_blocks"] = (*lead, columns // 32, 16)
                got[name + "_scales"] = (*lead, columns // 32)
            else:
                got[name] = spec.shape
        assert got == expected

    def test_norms_begin_with_one_and_biases_with_zero(self, config):
        for name, spec in parameter_specs(config).items():
            kind = "ones" if "norm" in name else "zeros" if name.endswith("bias") else "normal"
            assert spec.init == kind


class TestRead:
    @pytest.mark.parametrize("shards", [1, 2, 5])
    @pytest.mark.parametrize("style", ["released", "transformers5"])
    def test_every_byte_is_kept(self, tmp_path, originals, shards, style):
        tiny.write(NAME, tmp_path, shards, style)
        parameters = read(tmp_path, GptOssConfig.from_folder(tmp_path))
        assert_is_on_disk(parameters, originals)
        specs = parameter_specs(GptOssConfig.from_folder(tmp_path))
        assert parameters.keys() == specs.keys()
        for name, spec in specs.items():
            assert parameters[name].axes == spec.axes and parameters[name].shape == spec.shape

    def test_builds_the_model(self, tmp_path):
        tiny.write(NAME, tmp_path)
        model = loader.load_model(tmp_path)
        assert (
            sum(leaf.nbytes for leaf in jax.tree.leaves(model)) == Checkpoint.open(tmp_path).nbytes
        )

    def test_packed_experts_take_no_more_memory_than_disk(self, tmp_path, config, originals):
        parameters = read(write(tmp_path, originals), config)
        experts = [p for p in parameters.values() if isinstance(p, BlockScaled)]
        assert len(experts) == 2 * config.num_hidden_layers
        on_disk = sum(
            a.nbytes for key, a in originals.items() if key.endswith(("blocks", "scales"))
        )
        assert sum(p.nbytes for p in experts) == on_disk
        assert (
            sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
            == Checkpoint.open(tmp_path).nbytes
        )

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_cast(self, tmp_path, config, tensors, dtype):
        wide = originals_in_float32(tensors)
        for folder, source in (("a", tensors), ("b", wide)):
            (tmp_path / folder).mkdir()
            parameters = read(write(tmp_path / folder, source), config, dtype=dtype)
            for name, value in parameters.items():
                if not isinstance(value, BlockScaled):
                    assert value.dtype == dtype
                    np.testing.assert_array_equal(
                        np.asarray(value.array).astype(np.float32), wide[name]
                    )
                else:
                    assert value.blocks.dtype == np.uint8

    def test_dtype_of_the_file_is_kept_without_a_cast(self, tmp_path, config, tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
        parameters = read(write(tmp_path, tensors), config)
        assert parameters["lm_head.weight"].dtype == jnp.float32
        assert parameters["model.norm.weight"].dtype == jnp.bfloat16

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
    def test_dtype_must_be_a_float(self, tmp_path, config, tensors, dtype):
        write(tmp_path, tensors)
        with pytest.raises(TypeError, match="must be a float dtype"):
            read(tmp_path, config, dtype=dtype)

    def test_float_experts_of_transformers_are_transposed(self, tmp_path, config, tensors, rng):
        expected = with_float_experts(tensors, rng)
        value = read(write(tmp_path, tensors), config)[EXPERTS]
        assert value.axes == ("expert", "out", "in")
        np.testing.assert_array_equal(np.asarray(value.array), expected)

    def test_float_experts_in_the_packed_orientation_are_refused(
        self, tmp_path, config, tensors, rng
    ):
        tensors[EXPERTS] = with_float_experts(tensors, rng)
        fails(tmp_path, tensors, config, rf"{EXPERTS}: expected .*\[7, 64, 192\], got .*192, 64\]")

    def test_largest_first_and_each_once(self, tmp_path, config, tensors, monkeypatch):
        sizes = []
        monkeypatch.setattr(loader, "_READERS", 1)  # several may overtake each other
        real = Checkpoint.read
        monkeypatch.setattr(
            Checkpoint,
            "read",
            lambda self, name, index=(): (
                sizes.append(tensors[name].nbytes),
                real(self, name, index),
            )[1],
        )
        read(write(tmp_path, tensors), config)
        assert sizes == sorted((array.nbytes for array in tensors.values()), reverse=True)

    def test_progress_goes_to_stderr_and_counts_all_bytes(self, tmp_path, config, capsys, tensors):
        read(write(tmp_path, tensors), config, progress=True)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "100%" in printed.err and "B/s" in printed.err
        read(tmp_path, config)
        assert capsys.readouterr().err == ""


def originals_in_float32(tensors):
    return {
        key: array if array.dtype == np.uint8 else array.astype(np.float32)
        for key, array in tensors.items()
    }


def with_float_experts(tensors, rng):
    """Replaces one packed weight by transposed floats; returns them as {expert, out, in}."""
    experts, rows, blocks, _ = tensors.pop(BLOCKS).shape
    del tensors[SCALES]
    weight = rng.standard_normal((experts, rows, blocks * 32)).astype(ml_dtypes.bfloat16)
    tensors[EXPERTS] = weight.swapaxes(1, 2)
    return weight


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


class TestDamage:
    def test_kinds_are_all_kinds(self, originals):
        assert len(KINDS) == 22
        generic = {re.sub(r"layers\.\d+", "layers.2", key) for key in originals}
        assert generic == set(KINDS)

    @pytest.mark.parametrize("name", KINDS)
    def test_missing(self, tmp_path, tensors, config, name):
        del tensors[name]
        fails(tmp_path, tensors, config, rf"{re.escape(name)}: expected .*, got nothing")

    @pytest.mark.parametrize("name", KINDS)
    def test_wrong_shape(self, tmp_path, tensors, config, name):
        """Two axes swapped where there are two, else one element too many."""
        array = tensors[name]
        wrong = array.swapaxes(0, 1) if array.ndim > 1 else np.append(array, array[:1])
        tensors[name] = wrong
        got = re.escape(str(list(wrong.shape)))
        expected = re.escape(str(list(array.shape)))
        fails(tmp_path, tensors, config, rf"{re.escape(name)}: expected .*{expected}, got .*{got}")

    @pytest.mark.parametrize("name", KINDS)
    def test_wrong_dtype(self, tmp_path, tensors, config, name):
        array = tensors[name]
        wrong = np.dtype(np.int8 if array.dtype == np.uint8 else np.int16)
        tensors[name] = array.view(wrong)
        got = {1: "I8", 2: "I16"}[wrong.itemsize]
        fails(tmp_path, tensors, config, rf"{re.escape(name)}: expected .*, got {got} \[")

    def test_everything_is_listed_at_once(self, tmp_path, tensors, config):
        del tensors["lm_head.weight"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
        tensors["model.extra"] = np.zeros(3, np.float32)
        message = fails(
            tmp_path,
            tensors,
            config,
            r"lm_head\.weight: expected BF16 or F16 or F32 \[257, 64\], got nothing",
            r"model\.safetensors, model\.norm\.weight: expected .* \[64\], got BF16 \[63\]",
            r"model\.safetensors, model\.extra: expected no such tensor",
        )
        assert len(message.splitlines()) == 4

    @pytest.mark.parametrize("layers", [2, 6])
    def test_another_number_of_layers(self, tmp_path, tensors, config, layers):
        kinds = ("sliding_attention", "full_attention") * (layers // 2)
        other = GptOssConfig.from_dict(
            tiny.config(NAME) | {"num_hidden_layers": layers, "layer_types": list(kinds)}
        )
        expected = "no such tensor" if layers == 2 else "got nothing"
        fails(tmp_path, tensors, other, expected)

    def test_both_floats_and_mxfp4(self, tmp_path, tensors, config, rng):
        both = dict(tensors)
        with_float_experts(tensors, rng)
        both[EXPERTS] = tensors[EXPERTS]
        fails(tmp_path, both, config, f"{EXPERTS}: expected floats or MXFP4, got both")

    def test_experts_missing_altogether(self, tmp_path, tensors, config):
        del tensors[BLOCKS], tensors[SCALES]
        fails(tmp_path, tensors, config, f"{EXPERTS}: expected .*or MXFP4.*, got nothing")

    def test_bytes_where_floats_belong(self, tmp_path, tensors, config):
        tensors["lm_head.weight"] = np.zeros((257, 64), np.uint8)
        fails(tmp_path, tensors, config, r"lm_head\.weight: expected .*, got U8")

    @pytest.mark.parametrize("scale", [253, 254, 255])
    @pytest.mark.parametrize("name", [SCALES, SCALES.replace("gate_up", "down")])
    def test_scale_beyond_the_range_of_floats(self, tmp_path, tensors, config, name, scale):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 11, 1] = scale
        write(tmp_path, tensors)
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: a scale .*\[3, 11, 1\]"):
            read(tmp_path, config)

    @pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
    def test_values_that_are_not_finite(self, tmp_path, tensors, config, dtype, value):
        name = f"{LAYER}mlp.router.weight"
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][4, 17] = value
        write(tmp_path, tensors)
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: NaN .* at \[4, 17\]"):
            read(tmp_path, config)

    def test_value_that_is_not_finite_in_float_experts(self, tmp_path, tensors, config, rng):
        with_float_experts(tensors, rng)
        tensors[EXPERTS] = tensors[EXPERTS].copy()
        tensors[EXPERTS][6, 63, 191] = np.inf
        write(tmp_path, tensors)
        with pytest.raises(CheckpointError, match=rf"{EXPERTS}: NaN .* at \[6, 63, 191\]"):
            read(tmp_path, config)

    @pytest.mark.parametrize("scale", [0, 1, 252])
    def test_scales_within_the_range_load(self, tmp_path, tensors, config, scale):
        tensors[SCALES] = np.full_like(tensors[SCALES], scale)
        parameters = read(write(tmp_path, tensors), config)
        assert np.isfinite(np.asarray(parameters[EXPERTS].dequantize(jnp.float32).array)).all()

    def test_missing_shard(self, tmp_path):
        tiny.write(NAME, tmp_path, 3)
        (tmp_path / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: No such file"):
            loader.load_model(tmp_path)

    @pytest.mark.parametrize("count", [1, 1000, 10**5])
    def test_truncated_shard(self, tmp_path, count):
        tiny.write(NAME, tmp_path, 3)
        path = tmp_path / "model-00002-of-00002.safetensors"
        os.truncate(path, path.stat().st_size - count)
        with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: .*truncated"):
            loader.load_model(tmp_path)

    def test_file_truncated_while_loading(self, tmp_path, config, tensors):
        path = write(tmp_path, tensors) / "model.safetensors"
        checkpoint = Checkpoint.open(tmp_path)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="changed while loading"):
            loader.read_parameters(checkpoint, config)

    def test_no_configuration(self, tmp_path, tensors):
        (write(tmp_path, tensors) / "config.json").unlink()
        with pytest.raises(ConfigError, match="config.json"):
            loader.load_model(tmp_path)


MEASURE = """
import sys
import jax
from gpt_oss.loader import load_model

def peak():  # of this program alone; getrusage would count what the parent had when it forked
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

jax.device_put(0.0).block_until_ready()
before = peak()
model = load_model(sys.argv[1])
print(before * 1024, peak() * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_little_more_than_the_checkpoint(tmp_path):
    size = sparse_checkpoint.write(tmp_path, num_layers=2, num_experts=6, vocab=12345)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = map(int, result.stdout.split())
    assert size > 250e6
    assert 0.95 * size < peak - before <= 1.15 * size

"""What is written: the released layout, and bit for bit what was given."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import tiny

from gpt_oss.config import GptOssConfig
from gpt_oss.layout import parameter_specs
from gpt_oss.loader import read_parameters
from gpt_oss.writer import write_checkpoint
from moe_jax import tag
from moe_jax.checkpoint import Checkpoint
from moe_jax.quantization import BlockScaled, quantize_integers

NAME = "released_numbers"


@pytest.fixture(scope="module")
def config():
    return GptOssConfig.from_dict(tiny.config(NAME))


@pytest.fixture(scope="module")
def parameters(config):
    """The tiny checkpoint's tensors as parameters, without the loader."""
    tensors = tiny.tensors(NAME)
    result = {}
    for name, spec in parameter_specs(config).items():
        if name in tensors:
            result[name] = tag(jnp.asarray(tensors[name].view(ml_dtypes.bfloat16)), *spec.axes)
        else:
            result[name] = BlockScaled(
                tag(jnp.asarray(tensors[name + "_blocks"]), "expert", "out", "block", "byte"),
                tag(jnp.asarray(tensors[name + "_scales"]), "expert", "out", "block"),
            )
    return result


def stored(folder):
    """Bits, dtype name and shape of all tensors, as the safetensors library reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "numpy") as opened:
            assert opened.metadata() is None
            for key in opened.keys():
                array = opened.get_tensor(key)
                assert key not in found
                found[key] = array.view(f"u{array.itemsize}")
    return found


@pytest.mark.parametrize(("limit", "shards"), [(10**9, 1), (200_000, 3)])
def test_tensors_are_the_released_ones(tmp_path, config, parameters, limit, shards):
    write_checkpoint(tmp_path, config, parameters.__getitem__, max_shard_bytes=limit)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert files == [f"model-{n:05d}-of-{shards - 1:05d}.safetensors" for n in range(shards)]
    found, expected = stored(tmp_path), tiny.tensors(NAME)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype


def test_single_file_is_byte_for_byte_the_released_layout(tmp_path, config, parameters):
    write_checkpoint(tmp_path, config, parameters.__getitem__)
    expected = tiny.safetensors_bytes(tiny.tensors(NAME))
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_index_names_every_tensor(tmp_path, config, parameters):
    write_checkpoint(tmp_path, config, parameters.__getitem__, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = tiny.tensors(NAME)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())


def test_configuration_is_the_released_one(tmp_path, config, parameters):
    write_checkpoint(
        tmp_path, config, parameters.__getitem__, generation_config={"bos_token_id": 3}
    )
    written = json.loads((tmp_path / "config.json").read_text())
    expected = tiny.config(NAME)
    expected.pop("transformers_version")
    assert written == expected
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 3,
        "do_sample": True,
        "eos_token_id": [expected["eos_token_id"]],
        "pad_token_id": expected["pad_token_id"],
    }


def test_float_experts_are_written_transposed_and_load_back(tmp_path, config, parameters):
    def floats(name):
        value = parameters[name]
        return value.dequantize(jnp.bfloat16) if isinstance(value, BlockScaled) else value

    write_checkpoint(tmp_path, config, floats)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as opened:
        array = opened.get_tensor(name)
        assert not any(key.endswith(("_blocks", "_scales")) for key in opened.keys())
    np.testing.assert_array_equal(array, np.asarray(floats(name).untag("expert", "in", "out")))
    assert GptOssConfig.from_folder(tmp_path).quant_method is None
    loaded = read_parameters(Checkpoint.open(tmp_path), config)
    for name in parameters:
        np.testing.assert_array_equal(
            np.asarray(loaded[name].array), np.asarray(floats(name).array)
        )


def test_dtype_none_keeps_each_dtype(tmp_path, config, parameters):
    def wide_norm(name):
        value = parameters[name]
        return value.astype(jnp.float32) if name == "model.norm.weight" else value

    write_checkpoint(tmp_path, config, wide_norm, dtype=None)
    tensors = Checkpoint.open(tmp_path).tensors
    assert tensors["model.norm.weight"].dtype_name == "F32"
    assert tensors["lm_head.weight"].dtype_name == "BF16"


def test_weights_are_not_overwritten(tmp_path, config, parameters):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="model.safetensors"):
        write_checkpoint(tmp_path, config, parameters.__getitem__)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_wrong_shape_writes_nothing(tmp_path, config, parameters):
    def swapped(name):
        value = parameters[name]
        return tag(value.array.T, *value.axes) if name == "lm_head.weight" else value

    with pytest.raises(ValueError, match=r"lm_head\.weight.*voc=64"):
        write_checkpoint(tmp_path, config, swapped)
    assert not list(tmp_path.iterdir())


def test_other_packed_weights_are_refused(tmp_path, config, parameters):
    name = "model.layers.0.mlp.experts.down_proj"
    other = quantize_integers(parameters[name].dequantize(jnp.float32))
    with pytest.raises(TypeError, match=r"down_proj: gpt-oss .* got PackedIntegers"):
        write_checkpoint(tmp_path, config, {**parameters, name: other}.__getitem__)
    assert not list(tmp_path.glob("*.safetensors"))

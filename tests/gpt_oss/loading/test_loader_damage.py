"""Damage to a checkpoint is always an error, which says which tensor it is and what came."""

import os
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from loader_files import (
    BLOCKS,
    EXPERTS,
    LAYER,
    NAME,
    SCALES,
    fails,
    read,
    with_float_experts,
    write,
)

from gpt_oss import loader
from gpt_oss.config import GptOssConfig
from moe_jax.checkpoint import Checkpoint, CheckpointError, ConfigError

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
    def test_scale_beyond_the_range_of_floats(
        self, tmp_path, tensors, config, name, scale, record_property
    ):
        record_property("bad_input", "scale byte 255")
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

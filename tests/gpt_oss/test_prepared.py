"""Experts laid out for GPUs: the model computes the same, bit for bit, and goes back to disk."""

import importlib.util
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_model
from jax.sharding import AxisType

import gpt_oss
from gpt_oss import loader
from gpt_oss.config import GptOssConfig
from gpt_oss.engine import Engine
from gpt_oss.model import GptOss
from gpt_oss.writer import write_checkpoint
from moe_jax import BlockScaled, Sharding, TiledMXFP4, prepare_experts
from moe_jax.checkpoint import Checkpoint
from moe_jax.experts import prepare as prepare_module

NAME = "divisible_by_8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(NAME, tmp_path_factory.mktemp("prepared"))


def weights(model):
    return [block.mlp.experts.tree().gate_up for block in model.layers]


def logits(model: GptOss) -> np.ndarray:
    prompts = tiny.prompts(NAME)
    tokens = tiny_model.tokens([prompts["below_window"], prompts["several_windows"]])
    return np.asarray(jax.jit(lambda model: model(tokens).array)(model))


@pytest.mark.parametrize("algorithm", ["per_token", "dense", "grouped"])
def test_logits_are_the_same_bit_for_bit(folder, algorithm):
    options = {"dtype": jnp.float32, "algorithm": algorithm}
    plain = loader.load_model(folder, prepare=False, **options)
    prepared = loader.load_model(folder, prepare=True, **options)
    assert all(isinstance(weight, BlockScaled) for weight in weights(plain))
    assert all(isinstance(weight, TiledMXFP4) for weight in weights(prepared))
    np.testing.assert_array_equal(logits(prepared), logits(plain))


def test_engine_and_pretrained(folder):
    models = [loader.load_model(folder, dtype=jnp.float32, prepare=p) for p in (False, True)]
    prompt = tiny.prompts(NAME)["below_window"]
    tokens = [
        list(Engine(model, context=64).generate(prompt, max_tokens=20, stop_ids=()))
        for model in models
    ]
    assert tokens[1] == tokens[0] and len(tokens[0]) == 20
    found = gpt_oss.load("gpt-oss-nano", prepare=True)
    assert all(isinstance(weight, TiledMXFP4) for weight in weights(found.model))


def test_weights_on_several_devices(folder):
    mesh = jax.make_mesh((4, 2), ("e", "m"), axis_types=(AxisType.Auto,) * 2)
    for rules in ({"expert": "e", "voc": "m"}, {"expert": "e", "out": "m"}, {"in": "m"}):
        place = loader.place_sharded(Sharding(mesh, rules))
        config, checkpoint = GptOssConfig.from_folder(folder), Checkpoint.open(folder)
        spread = loader.read_parameters(checkpoint, config, place=place, prepare=prepare_experts)
        whole = loader.read_parameters(checkpoint, config)
        for name, weight in spread.items():
            expected = whole[name]
            if isinstance(expected, BlockScaled):
                assert isinstance(weight, TiledMXFP4)
                weight = weight.untile()
            for one, other in zip(jax.tree.leaves(weight), jax.tree.leaves(expected), strict=True):
                assert len(one.sharding.device_set) == 8
                np.testing.assert_array_equal(one, other)


def test_one_weight_at_a_time_is_held_twice(folder):
    alive: list[weakref.ref] = []

    def prepare(weight):
        if not isinstance(weight, BlockScaled):
            return weight
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(weight.blocks.array))
        return prepare_experts(weight)

    config = GptOssConfig.from_folder(folder)
    loader.read_parameters(Checkpoint.open(folder), config, prepare=prepare)
    assert len(alive) == 2 * config.num_hidden_layers


@pytest.mark.parametrize("has_jax_triton", [True, False])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_default_is_by_the_devices(folder, monkeypatch, has_gpu, has_jax_triton):
    real_devices = jax.devices

    def devices(kind=None):
        if kind != "cuda":
            return real_devices(kind)
        if not has_gpu:
            raise RuntimeError("Unknown backend cuda")
        return real_devices()[:1]

    monkeypatch.setattr(prepare_module.jax, "devices", devices)
    spec = object() if has_jax_triton else None
    real_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: spec if name == "jax_triton" else real_spec(name, *rest),
    )
    kinds = {type(weight) for weight in weights(loader.load_model(folder))}
    assert kinds == {TiledMXFP4 if has_gpu and has_jax_triton else BlockScaled}
    experts = weights(loader.load_model(folder, prepare=False))[0]
    elsewhere = jax.device_put(experts, real_devices()[3])
    assert prepare_module.prepare_for_devices(elsewhere) is elsewhere


def test_prepared_weights_are_written_as_they_were_read(folder, tmp_path):
    config, checkpoint = GptOssConfig.from_folder(folder), Checkpoint.open(folder)
    prepared = loader.read_parameters(checkpoint, config, prepare=prepare_experts)
    write_checkpoint(tmp_path, config, prepared.__getitem__)
    written = Checkpoint.open(tmp_path)
    assert written.tensors.keys() == checkpoint.tensors.keys()
    for name in written.tensors:
        ours, theirs = written.read(name), checkpoint.read(name)
        np.testing.assert_array_equal(ours.view("u1"), theirs.view("u1"))
    packed = [name for name in written.tensors if name.endswith("_blocks")]
    assert len(packed) == 2 * config.num_hidden_layers

"""A tiny checkpoint in one file, for tests of loading to change before they read it."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from gpt_oss import loader
from gpt_oss.config import GptOssConfig
from moe_jax.checkpoint import Checkpoint, CheckpointError

NAME = "released_numbers"
LAYER = "model.layers.2."
EXPERTS = f"{LAYER}mlp.experts.gate_up_proj"
BLOCKS, SCALES = f"{EXPERTS}_blocks", f"{EXPERTS}_scales"
CONFIG = GptOssConfig.from_dict(tiny.config(NAME))


def originals():
    """The tensors with the dtypes that they have on disk."""
    return {
        key: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
        for key, array in tiny.tensors(NAME).items()
    }


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


def with_float_experts(tensors, rng):
    """Replaces one packed weight by transposed floats; returns them as {expert, out, in}."""
    experts, rows, blocks, _ = tensors.pop(BLOCKS).shape
    del tensors[SCALES]
    weight = rng.standard_normal((experts, rows, blocks * 32)).astype(ml_dtypes.bfloat16)
    tensors[EXPERTS] = weight.swapaxes(1, 2)
    return weight

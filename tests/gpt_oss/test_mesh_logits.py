"""gpt-oss on every mesh of up to eight devices: logits, and the 64 greedy tokens."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import tiny_model
from sharding_tools import MESHES
from tiny_mesh import sharding

import moe_jax
from gpt_oss.model import GptOss
from moe_jax import Tagged

pytestmark = pytest.mark.usefixtures("little_compiling")

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
NAME = "divisible_by_8"
PROMPTS = list(tiny.prompts(NAME).values())
GREEDY = GOLDENS[f"{NAME}/greedy"].tolist()
TOLERANCE = 5e-5


@functools.cache
def expected(*ids: int) -> np.ndarray:
    return oracle.logits(tiny_model.weights(NAME), tiny.config(NAME), list(ids))


@jax.jit
def logits(model: GptOss, tokens: Tagged) -> jax.Array:
    return model(tokens).untag("b", "s", "voc")


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_logits(sizes: tuple[int, int, int]) -> None:
    """Four rows; the last is a prompt with the 64 tokens that follow it, each the likeliest."""
    rows = [PROMPTS[3][:20], PROMPTS[1], PROMPTS[0], PROMPTS[0] + GREEDY]
    model = tiny_model.build(NAME, packed=True, sharding=sharding(sizes))
    found = np.asarray(logits(model, tiny_model.tokens(rows)))
    for row, ids in zip(found, rows, strict=True):
        np.testing.assert_allclose(row[: len(ids)], expected(*ids), rtol=0, atol=TOLERANCE)
    begin = len(PROMPTS[0]) - 1
    assert found[3, begin : begin + len(GREEDY)].argmax(-1).tolist() == GREEDY


@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 2, 2), (2, 2, 2), (1, 1, 8)], ids=str)
def test_what_travels(sizes: tuple[int, int, int]) -> None:
    """One sum a layer for the experts, one for attention where heads are split; no weights.

    Where the batch is split over the experts' devices, each layer gathers its rows once, too.
    """
    model = tiny_model.build(NAME, packed=True, sharding=sharding(sizes))
    tokens = tiny_model.tokens([[1, 2, 3], [4, 5, 6]])
    text = logits.lower(model, tokens).compile().as_text()
    largest = {name: 0 for name in ("all-gather", "all-to-all", "collective-permute")}
    sums = gathers = 0
    for line in text.splitlines():
        operation = line.partition(" = ")[2].partition("(")[0]
        shape, _, name = operation.rpartition(" ")
        name = name.removesuffix("-start")
        sums += name == "all-reduce"
        gathers += name == "all-gather"
        if name in largest:
            dims = shape.partition("[")[2].partition("]")[0]
            largest[name] = max(largest[name], int(np.prod([int(n) for n in dims.split(",") if n])))
    layers = model.config.num_hidden_layers
    assert sums == 1 + layers * (2 if sizes[2] > 1 else 1)
    assert max(largest.values()) <= 6 * model.config.hidden_size
    if sizes == (1, 2, 2):  # the batch of two is split; the rows of the head are gathered
        assert gathers == layers + 1


def test_exchange_within_a_model() -> None:
    here = sharding((1, 4, 1), communication="all_to_all")
    model = tiny_model.build(NAME, packed=True, sharding=here)
    found = np.asarray(logits(model, tiny_model.tokens([PROMPTS[3]])))[0]
    np.testing.assert_allclose(found, expected(*PROMPTS[3]), rtol=0, atol=TOLERANCE)


def test_bfloat16_with_tiles_is_near() -> None:
    """The layer that is kernels on GPUs."""
    here = sharding((1, 2, 2))
    model = tiny_model.build(
        NAME,
        packed=True,
        dtype=jnp.bfloat16,
        sharding=here,
        prepare=moe_jax.prepare_experts,
    )
    found = np.asarray(logits(model, tiny_model.tokens([PROMPTS[2]])))[0]
    assert 1e-3 < np.abs(found - expected(*PROMPTS[2])).mean() < 0.04

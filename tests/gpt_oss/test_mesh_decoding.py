"""What a step of decoding sends between devices."""

import re

import jax
import pytest
import tiny_model
from tiny_mesh import sharding

from gpt_oss.cache import Cache
from moe_jax import Tagged

pytestmark = pytest.mark.usefixtures("little_compiling")

NAME = "divisible_by_8"
SENT = re.compile(
    r"= \(?\w+\[([\d,]*)\]\S* "
    r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


def sent(sizes: tuple[int, int, int], rows: int) -> list[tuple[tuple[int, ...], str]]:
    """The shapes of what travels in a step of so many rows, and how."""
    model = tiny_model.build(NAME, packed=True, sharding=sharding(sizes))

    @jax.jit
    def step(model, cache: Cache, tokens: Tagged):
        return model.step(tokens, cache)

    cache = jax.jit(lambda model: model.empty_cache(rows, 16))(model)
    text = step.lower(model, cache, tiny_model.tokens([[1]] * rows)).compile().as_text()
    return [(tuple(map(int, shape.split(","))), kind) for shape, kind in SENT.findall(text)]


def test_one_row_on_copies_of_the_model_sends_nothing():
    """Every device does all of it: no slower than one alone."""
    assert sent((4, 1, 1), 1) == []


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (2, 2, 2)], ids=str)
def test_keys_and_values_stay_where_they_are(sizes):
    """Of eight rows that are split over devices. Activations, logits and routing may travel."""
    widest = max(len(shape) for shape, _ in sent(sizes, 8))
    assert widest <= 3  # keys and values have rows, positions, heads and their size


@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 2, 2)], ids=str)
def test_one_row_on_a_model_that_is_spread(sizes):
    """Two sums a layer, one of embeddings, and what the last logits need."""
    found = sent(sizes, 1)
    layers = tiny_model.config(NAME).num_hidden_layers
    assert [kind for _, kind in found].count("all-reduce") == 2 * layers + 1
    assert [kind for _, kind in found if kind != "all-reduce"] in ([], ["all-gather"])

"""Generation with a model that is spread over a mesh."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_model
from sharding_tools import bytes_by_device
from tiny_mesh import sharding

from gpt_oss import chunks
from gpt_oss.engine import Engine
from gpt_oss.generation import Request

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
NAME = "divisible_by_8"
PROMPTS = list(tiny.prompts(NAME).values())
GREEDY = GOLDENS[f"{NAME}/greedy"].tolist()


@pytest.mark.parametrize("sizes", [(2, 2, 2)], ids=str)
def test_engine(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, a prompt in chunks, and two rows, which are split or whole on every device."""
    monkeypatch.setattr(chunks, "PREFILL_CHUNKS", (8,))
    here = sharding(sizes)
    engine = Engine(tiny_model.build(NAME, packed=True, sharding=here), context=96, batch=2)
    requests = [Request(PROMPTS[0], max_tokens=64, stop_ids=()), Request(PROMPTS[1], max_tokens=2)]
    assert engine.stream(requests).collect()[0] == GREEDY


def test_a_cache_lies_with_its_heads() -> None:
    model = tiny_model.build(NAME, packed=True, sharding=sharding((1, 2, 4)))
    cache = jax.jit(lambda model: model.empty_cache(4, 32))(model)
    held = bytes_by_device(cache.layers)
    assert set(held.values()) == {sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) // 8}

"""Long chunks in two pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import tiny_model
from tiny_mesh import sharding

from gpt_oss import overlap
from gpt_oss.overlap import LEAST_TOKENS, pieces
from moe_jax import tag

pytestmark = pytest.mark.usefixtures("little_compiling")

NAME = "divisible_by_8"
TOLERANCE = 5e-5


def test_pieces() -> None:
    here, size = sharding((1, 1, 2)), 2 * LEAST_TOKENS
    assert pieces(1, size, here) == [(0, LEAST_TOKENS), (LEAST_TOKENS, size)]
    assert pieces(3, size - 1, here) == [(0, LEAST_TOKENS - 1), (LEAST_TOKENS - 1, size - 1)]
    assert pieces(1, size - 1, here) == [(0, size - 1)]
    assert pieces(2 * size, 1, here) == [(0, 1)]


def test_a_model_that_sends_nothing_takes_a_chunk_whole() -> None:
    assert pieces(1, 10**6, None) == [(0, 10**6)]
    assert pieces(1, 10**6, sharding((4, 1, 1))) == [(0, 10**6)]


def test_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end in the second piece, and in the first; the chunk after it sees both pieces."""
    monkeypatch.setattr(overlap, "LEAST_TOKENS", 8)
    model = tiny_model.build(NAME, packed=True, sharding=sharding((2, 2, 2)))
    ids = tiny.prompts(NAME)["several_windows"]
    prompts = [ids[:17], ids[3:8]]
    chunks = [[prompt[:16] for prompt in prompts], [prompt[16:] for prompt in prompts]]

    @jax.jit
    def step(model, tokens, cache, count):
        return model.step(tokens, cache, count=count)

    cache, found = jax.jit(lambda model: model.empty_cache(2, 24))(model), {}
    for size, chunk in zip((16, 1), chunks, strict=True):
        tokens = tiny_model.tokens([part + [0] * (size - len(part)) for part in chunk])
        count = tag(jnp.asarray([len(part) for part in chunk], jnp.int32), "b")
        if size == 16:
            text = step.lower(model, tokens, cache, count).as_text()
            assert text.count("optimization_barrier") == model.config.num_hidden_layers
        out, cache = step(model, tokens, cache, count)
        found |= {row: out.array[row] for row, part in enumerate(chunk) if part}
    for row, prompt in enumerate(prompts):
        expected = oracle.logits(tiny_model.weights(NAME), tiny.config(NAME), prompt)[-1]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=TOLERANCE)

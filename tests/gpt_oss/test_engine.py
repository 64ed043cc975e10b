"""The engine against 64 greedy tokens of transformers, and against itself in other batches."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracle
import pytest
import tiny
import tiny_model
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_oss import chunks
from gpt_oss import engine as engine_module
from gpt_oss.engine import Engine
from gpt_oss.generation import Request
from gpt_oss.sampling import Greedy, Sampler

pytestmark = pytest.mark.usefixtures("little_compiling")

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
NAME, CONTEXT, VOCABULARY = "rope_truncated", 96, 229
PROMPT = tiny.prompts(NAME)["below_window"]
GREEDY = GOLDENS[f"{NAME}/greedy"].tolist()


@pytest.fixture(scope="module")
def one() -> Engine:
    return Engine(tiny_model.build(NAME), context=CONTEXT)


@pytest.fixture(scope="module")
def three() -> Engine:
    return Engine(tiny_model.build(NAME), context=CONTEXT, batch=3)


def test_greedy_tokens(one: Engine) -> None:
    """64 tokens; the window is 10, so the ring goes round several times."""
    assert list(one.generate(PROMPT, max_tokens=64, stop_ids=())) == GREEDY


def test_greedy_tokens_with_packed_experts() -> None:
    name = "all_experts_per_token"
    engine = Engine(tiny_model.build(name, packed=True), context=CONTEXT)
    prompt = tiny.prompts(name)["below_window"]
    found = list(engine.generate(prompt, max_tokens=64, stop_ids=()))
    assert found == GOLDENS[f"{name}/greedy"].tolist()


def test_prompts_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """35 tokens taken as 8 + 8 + 8 + 8 + 3 of 4; the row beside it ends in the second chunk."""
    monkeypatch.setattr(chunks, "PREFILL_CHUNKS", (4, 8))
    engine = Engine(tiny_model.build(NAME), context=CONTEXT, batch=2)
    prompts = [tiny.prompts(NAME)["several_windows"], PROMPT]
    rows = engine.stream([Request(p, max_tokens=3, stop_ids=()) for p in prompts]).collect()
    first = oracle.greedy(tiny_model.weights(NAME), tiny.config(NAME), prompts[0], 3)
    assert rows == [first, GREEDY[:3]]


def test_longer_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full layers look 16, then 64 positions far."""
    monkeypatch.setattr(engine_module, "_REACHES", (16, 64))
    engine = Engine(tiny_model.build(NAME), context=CONTEXT)
    assert list(engine.generate(PROMPT, max_tokens=64, stop_ids=())) == GREEDY


def test_batch_of_different_prompts(three: Engine) -> None:
    """Each row gives what it gives alone: its prompt's length, limit and sampler are its own."""
    several = tiny.prompts(NAME)["several_windows"]
    requests = [
        Request(PROMPT, max_tokens=64, stop_ids=()),
        Request(several, Sampler(0.9, top_p=0.8), max_tokens=9, stop_ids=(), seed=3),
        Request(PROMPT[:1], Sampler(), max_tokens=30, stop_ids=(), seed=4),
    ]
    together = three.stream(requests)
    rows = together.collect()
    assert rows[0] == GREEDY
    assert [len(row) for row in rows] == [64, 9, 30]
    assert together.statistics.finish_reasons == ["length"] * 3
    assert together.statistics.generated_tokens == 103
    for request, row in zip(requests[1:], rows[1:], strict=True):
        assert three.stream([request]).collect() == [row]


def test_seed_decides_whatever_the_blocks(one: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(seed: int) -> list[int]:
        return list(one.generate(PROMPT, Sampler(1.5), max_tokens=40, stop_ids=(), seed=seed))

    first = draw(11)
    assert draw(11) == first
    assert draw(12) != first
    monkeypatch.setattr(engine_module, "BLOCK", 3)
    other = Engine(tiny_model.build(NAME), context=CONTEXT)
    found = list(other.generate(PROMPT, Sampler(1.5), max_tokens=40, stop_ids=(), seed=11))
    assert found == first


def test_stop_ids(one: Engine, three: Engine) -> None:
    stop = GREEDY[20]
    end = GREEDY.index(stop) + 1
    generation = one.generate(PROMPT, max_tokens=64, stop_ids=[stop])
    assert list(generation) == GREEDY[:end]
    assert generation.statistics.finish_reasons == ["stop"]
    rows = three.stream(
        [
            Request(PROMPT, max_tokens=30, stop_ids=[stop]),
            Request(PROMPT, max_tokens=30, stop_ids=()),
        ]
    ).collect()
    assert rows == [GREEDY[:end], GREEDY[:30]]


def test_the_first_token_may_stop(one: Engine) -> None:
    generation = one.generate(PROMPT, stop_ids=[GREEDY[0]])
    assert list(generation) == GREEDY[:1]
    assert generation.statistics.finish_reasons == ["stop"]


def test_stop_ids_of_the_model(one: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(one.generate(PROMPT, max_tokens=1)) == GREEDY[:1]
    monkeypatch.setattr(one, "_stop_ids", (GREEDY[0],))
    assert list(one.generate(PROMPT, max_tokens=2)) == GREEDY[:1]


def test_the_context_ends_generation(one: Engine) -> None:
    prompt = (PROMPT * 11)[: CONTEXT - 3]
    generation = one.generate(prompt, stop_ids=())
    assert len(list(generation)) == 3
    assert generation.statistics.finish_reasons == ["length"]


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [(float("inf"), [1, 1, 2, 4, 8, 16, 32]), (0.0, [1] * 64)],
    ids=["fast", "slow"],
)
def test_blocks_grow_while_they_are_fast_enough(
    one: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float, sizes: list[int]
) -> None:
    monkeypatch.setattr(engine_module, "BLOCK_SECONDS", seconds)
    blocks = list(one.stream([Request(PROMPT, max_tokens=64, stop_ids=())]))
    assert [len(block[0]) for block in blocks] == sizes
    assert [token for block in blocks for token in block[0]] == GREEDY


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"),
    [
        (1, 0.04, 2),  # two take 0.08 s
        (1, 0.06, 1),
        (1, 9.0, 1),
        (8, 0.04, 16),
        (8, 0.06, 8),
        (8, 0.11, 4),
        (8, 0.75, 1),
        (32, 0.01, 32),
    ],
)
def test_a_block_takes_a_tenth_of_a_second_at_most(
    steps: int, seconds: float, expected: int
) -> None:
    assert engine_module._next_steps(steps, seconds) == expected


def test_statistics() -> None:
    """The first run has both rates too: what compiling took is not in them."""
    engine = Engine(tiny_model.build(NAME), context=CONTEXT)
    for is_first in (True, False):
        generation = engine.generate(PROMPT, max_tokens=20, stop_ids=())
        statistics = generation.statistics
        assert (statistics.prompt_tokens, statistics.generated_tokens) == (len(PROMPT), 0)
        assert statistics.first_token_seconds is None
        begin = time.perf_counter()
        tokens = list(generation)
        seconds = time.perf_counter() - begin
        assert statistics.generated_tokens == len(tokens) == 20
        assert (statistics.compile_seconds > 0) == is_first
        assert statistics.prefill.tokens == len(PROMPT)
        assert statistics.decoding.tokens == 19
        assert statistics.first_token_seconds is not None
        assert statistics.first_token_seconds >= statistics.prefill.seconds > 0
        assert statistics.decoding.per_second is not None
        parts = (
            statistics.compile_seconds,
            statistics.prefill.seconds,
            statistics.decoding.seconds,
        )
        assert sum(parts) <= seconds
        if is_first:  # a model this small compiles for longer than it runs
            assert statistics.compile_seconds > seconds / 2


def test_tokens_count_when_they_are_taken(one: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a block, and the end is known with the last one only."""
    monkeypatch.setattr(engine_module, "BLOCK_SECONDS", float("inf"))
    generation = one.generate(PROMPT, max_tokens=12, stop_ids=())  # blocks of 1, 1, 2, 4 and 4
    statistics = generation.statistics
    for taken, _ in enumerate(generation, start=1):
        assert statistics.generated_tokens == taken
        assert statistics.finish_reasons == ["length" if taken == 12 else None]


def test_a_model_on_several_devices() -> None:
    """Compiled programs take sharded parameters, and the state that comes out of them."""
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])

    def place(array: jax.Array) -> jax.Array:
        is_even = array.ndim == 2 and array.shape[-1] % 2 == 0
        return jax.device_put(array, NamedSharding(mesh, P(None, "x") if is_even else P()))

    model = jax.tree.map(place, tiny_model.build(NAME))
    assert any(not array.sharding.is_fully_replicated for array in jax.tree.leaves(model))
    engine = Engine(model, context=CONTEXT)
    for _ in range(2):
        assert list(engine.generate(PROMPT, max_tokens=30, stop_ids=())) == GREEDY[:30]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt_ids": []}, ValueError, "the prompt has no tokens"),
    ({"prompt_ids": [VOCABULARY]}, ValueError, "prompt ids must be .* size 229, got 229"),
    ({"prompt_ids": [-1]}, ValueError, "prompt ids must be at least 0"),
    ({"prompt_ids": ["a"]}, TypeError, "prompt ids must be integers, got 'a'"),
    ({"prompt_ids": [True]}, TypeError, "prompt ids must be integers"),
    ({"prompt_ids": [1] * CONTEXT}, ValueError, "the prompt has 96 tokens, the context holds 96"),
    ({"max_tokens": 0}, ValueError, "max_tokens must be between 1 and 87 .*got 0"),
    ({"max_tokens": 88}, ValueError, "max_tokens must be between 1 and 87 .*got 88"),
    ({"max_tokens": 2.0}, TypeError, "max_tokens must be an integer or None"),
    ({"stop_ids": [VOCABULARY]}, ValueError, "stop ids must be"),
    ({"seed": -1}, ValueError, "a seed must be"),
    ({"sampler": 0.7}, TypeError, "expected Greedy or Sampler"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_requests(
    one: Engine, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Refused at once, not when the first token is asked for."""
    arguments = {"prompt_ids": PROMPT, "sampler": Greedy()} | change
    with pytest.raises(error, match=message):
        one.stream([Request(**arguments)])


def test_bad_batches(three: Engine) -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"expected 1 to 3 requests, got {count}"):
            three.stream([Request(PROMPT)] * count)
    for arguments in ({"context": 0}, {"context": 131073}, {"context": 8, "batch": 0}):
        with pytest.raises(ValueError, match="must be"):
            Engine(tiny_model.build(NAME), **arguments)

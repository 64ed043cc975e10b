"""Sampling against distributions worked out in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_oss.sampling import Greedy, Sampler, Sampling
from moe_jax import tag

DRAWS = 4000
CHOOSE = jax.jit(Sampling.choose)


def choose(
    samplers: list[Any], logits: np.ndarray, seeds: list[int], index: list[int]
) -> list[int]:
    sampling = Sampling.of(samplers, seeds)
    arguments = tag(jnp.asarray(logits, jnp.float32), "b", "voc"), tag(jnp.asarray(index), "b")
    return CHOOSE(sampling, *arguments).array.tolist()


@jax.jit
def draws(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """The ids drawn at `DRAWS` indices."""

    def one(index: jax.Array) -> jax.Array:
        return sampling.choose(tag(logits[None], "b", "voc"), tag(index[None], "b")).array[0]

    return jax.vmap(one)(jnp.arange(DRAWS, dtype=jnp.int32))


def shares(sampler: Sampler, row: list[float]) -> np.ndarray:
    """How often each id is drawn over `DRAWS` indices of one seed."""
    drawn = draws(Sampling.of([sampler], [5]), jnp.asarray(row, jnp.float32))
    return np.bincount(np.asarray(drawn), minlength=len(row)) / DRAWS


def probabilities(row: list[float], temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(np.asarray(row) / temperature)
    return weights / weights.sum()


ROW = [0.3, 2.0, -1.0, 1.2, 0.7]  # by likelihood: 1, 3, 4, 0, 2


@pytest.mark.parametrize(
    ("sampler", "allowed"),
    [
        (Sampler(), [0, 1, 2, 3, 4]),
        (Sampler(temperature=2.5), [0, 1, 2, 3, 4]),
        (Sampler(top_k=2), [1, 3]),
        (Sampler(top_k=99), [0, 1, 2, 3, 4]),
        (Sampler(temperature=0.5, top_k=3), [1, 3, 4]),
        # shares .500 .225 .136 .091 .025 (ids 1, 3, 4, 0, 2), roughly
        (Sampler(top_p=0.6), [1, 3]),
        (Sampler(top_p=0.8), [1, 3, 4]),
        (Sampler(top_p=1e-6), [1]),
        (Sampler(min_p=0.3), [1, 3]),
        (Sampler(min_p=0.25), [1, 3, 4]),
        # top_p is a share of what top_k leaves
        (Sampler(top_k=2, top_p=0.65), [1]),
        (Sampler(top_k=2, top_p=0.75), [1, 3]),
        (Sampler(top_k=4, top_p=0.9, min_p=0.4), [1, 3]),
    ],
)
def test_distribution(sampler: Sampler, allowed: list[int]) -> None:
    expected = np.zeros(len(ROW))
    expected[allowed] = probabilities(ROW, sampler.temperature)[allowed]
    expected /= expected.sum()
    found = shares(sampler, ROW)
    assert set(np.flatnonzero(found)) == set(allowed)
    # five standard deviations
    np.testing.assert_array_less(
        np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9
    )


def test_greedy_and_temperature_zero() -> None:
    logits = np.asarray([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, -2.0, -0.5]])
    for samplers in (
        [Greedy()] * 2,
        [Sampler(temperature=0)] * 2,
        [Greedy(), Sampler(0.0, top_k=3)],
    ):
        assert choose(samplers, logits, [1, 2], [0, 9]) == [1, 0]


def test_greedy_next_to_a_sampler() -> None:
    logits = np.tile(np.linspace(0, 1, 50), (3, 1))
    for other in (Sampler(), Sampler(top_p=0.5)):
        for index in range(5):
            assert choose([Greedy(), other, Sampler(0.0)], logits, [1, 2, 3], [index] * 3)[::2] == [
                49,
                49,
            ]


def test_a_row_does_not_depend_on_its_neighbours(rng: np.random.Generator) -> None:
    """The same row alone, and beside a row that makes limits be computed."""
    logits = rng.standard_normal((1, 300))
    for index in range(10):
        alone = choose([Sampler(0.9)], logits, [7], [index])
        beside = choose(
            [Sampler(top_k=5), Sampler(0.9)], np.tile(logits, (2, 1)), [3, 7], [1, index]
        )
        assert beside[1:] == alone


def test_seed_and_index_matter_and_nothing_else(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((1, 1000)) * 0.1
    drawn = {
        (seed, index): choose([Sampler()], logits, [seed], [index])[0]
        for seed in (0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
        for index in range(3)
    }
    again = choose([Sampler()], logits, [2**32 + 1], [2])
    assert again == [drawn[2**32 + 1, 2]]
    assert len(set(drawn.values())) >= 16


def test_ties_do_not_let_more_through() -> None:
    """Four equal logits: `top_k` leaves the two lowest ids."""
    assert set(np.flatnonzero(shares(Sampler(top_k=2), [1.0] * 4))) == {0, 1}


def test_masked_logits_are_never_drawn() -> None:
    row = [0.0, -np.inf, 0.0, -np.inf]
    for sampler in (Sampler(), Sampler(top_k=3), Sampler(top_p=0.99), Sampler(temperature=100.0)):
        assert set(np.flatnonzero(shares(sampler, row))) == {0, 2}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0 or more"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": True}, TypeError, "temperature must be a number"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, or None"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer or None"),
        ({"top_k": True}, TypeError, "top_k must be an integer or None"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1"),
        ({"min_p": -0.1}, ValueError, "min_p must be at least 0 and below 1"),
        ({"min_p": 1}, ValueError, "min_p must be at least 0 and below 1"),
    ],
)
def test_bad_samplers(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**63, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_seeds(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="a seed must be"):
        Sampling.of([Sampler()], [seed])


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="expected one seed a sampler, got 2 for 1"):
        Sampling.of([Greedy()], [1, 2])
    with pytest.raises(TypeError, match="expected Greedy or Sampler"):
        Sampling.of(["greedy"], [1])  # type: ignore[list-item]

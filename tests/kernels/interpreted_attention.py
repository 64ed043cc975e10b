"""The attention kernels, interpreted; test_attention.py runs this file."""

import attention_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import EMPTY, Case
from triton_tools import interpreted_call

from moe_jax.kernels.attention import launch


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_call", interpreted_call)
        patch.setattr(launch, "cuda_capability", lambda: 90)
        yield


def check(case: Case) -> None:
    out = launch.attend(*map(jnp.asarray, case.arrays), window=case.window)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=3e-6)


SHAPES = {
    "prompt": oracle.sequence(0, 150, 150),
    "chunk": oracle.sequence(70, 40, 130),
    "token": oracle.sequence(140, 1, 200),
    "first token": oracle.sequence(0, 1, 70),
    "ring": oracle.ring(19, 30, 8),
    "ring, not full": oracle.ring(3, 70, 8),
}


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_values(rng, name, window):
    check(Case.random(rng, *SHAPES[name], kv=2, group=3, head_dim=12, window=window))


@pytest.mark.parametrize(("kv", "group", "head_dim"), [(1, 8, 16), (3, 1, 20), (1, 5, 32)])
@pytest.mark.parametrize("queries", [1, 40])
def test_heads(rng, kv, group, head_dim, queries):
    at = oracle.sequence(75, queries, 140)
    check(Case.random(rng, *at, kv=kv, group=group, head_dim=head_dim, window=None))


def test_rows_of_different_length(rng):
    """Keys in any order, rows that end early, and one that sees nothing."""
    q_at = np.array([[7, 8, 9], [0, 1, 2], [-1, -1, 0], [150, 151, 152]])
    k_at = np.stack([rng.permutation(np.where(np.arange(170) <= n, np.arange(170), EMPTY))
                     for n in (9, 2, -1, 152)])  # fmt: skip
    case = Case.random(rng, q_at, k_at, kv=1, group=2, head_dim=16, window=None)
    check(case)
    assert not case.seen()[2].any()


def test_sinks_of_any_size(rng):
    at = oracle.sequence(0, 20, 20)
    case = Case.random(rng, *at, kv=1, group=3, head_dim=16, window=None)
    case.sinks[:] = 1e4, -1e4, 0
    check(case)


def test_a_sink_of_minus_infinity_takes_nothing(rng):
    at = oracle.sequence(0, 20, 20)
    case = Case.random(rng, *at, kv=1, group=2, head_dim=16, window=None)
    case.sinks[:] = -np.inf
    check(case)


def test_large_scores(rng):
    at = oracle.sequence(100, 3, 130)
    case = Case.random(rng, *at, kv=1, group=2, head_dim=16, window=None)
    case.q[:] *= 1e3
    check(case)

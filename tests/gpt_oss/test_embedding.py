"""Token embeddings, whole and spread over devices."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_mesh import sharding

from gpt_oss.embedding import embed
from moe_jax import Tagged, tag

SIZES = [(1, 1, 1), (4, 1, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (2, 4, 1)]
VOCABULARY, HIDDEN = 24, 5


@pytest.fixture
def table(rng):
    values = rng.normal(size=(VOCABULARY, HIDDEN)).astype(ml_dtypes.bfloat16)
    values[3, 2] = np.nan  # stays with its row
    return values


def found(table: np.ndarray, ids: np.ndarray, sizes: tuple[int, int, int] | None) -> np.ndarray:
    here = None if sizes is None else sharding(sizes)
    named = tag(jnp.asarray(table), "voc", "d")
    placed = named if here is None else here.place(named)

    @jax.jit
    def call(table: Tagged, tokens: Tagged) -> Tagged:
        return embed(table, tokens, here)

    rows = call(placed, tag(jnp.asarray(ids, jnp.int32), "b", "s")).untag("b", "s", "d")
    assert rows.dtype == table.dtype
    return np.asarray(rows, np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 7)], ids=str)
@pytest.mark.parametrize("sizes", [None, *SIZES], ids=str)
def test_rows_of_the_table(rng, table, sizes, shape):
    ids = rng.integers(0, VOCABULARY, shape)
    np.testing.assert_array_equal(found(table, ids, sizes), table[ids].astype(np.float32))


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_tokens_outside_the_vocabulary(table, sizes):
    ids = np.array([[-1, VOCABULARY, VOCABULARY + 9, -(2**31), 2**31 - 1]])
    expected = table[[0, VOCABULARY - 1, VOCABULARY - 1, 0, VOCABULARY - 1]][None]
    np.testing.assert_array_equal(found(table, ids, sizes), expected.astype(np.float32))


def test_gradient(rng):
    """Of a table on eight devices: what each token's row adds, where a token comes twice."""
    here, ids = sharding((2, 2, 2)), np.array([[1, 5, 1], [23, 0, 5]])
    factors = rng.normal(size=(2, 3, HIDDEN))
    table = here.place(tag(jnp.zeros((VOCABULARY, HIDDEN), jnp.float32), "voc", "d"))

    @jax.jit
    @jax.grad
    def gradient(table: Tagged) -> jax.Array:
        rows = embed(table, tag(jnp.asarray(ids, jnp.int32), "b", "s"), here)
        return (rows.untag("b", "s", "d") * jnp.asarray(factors, jnp.float32)).sum()

    expected = np.zeros((VOCABULARY, HIDDEN))
    np.add.at(expected, ids, factors)
    np.testing.assert_allclose(gradient(table).untag("voc", "d"), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (4, 7)], ids=str)
def test_each_device_reads_its_own_rows(shape):
    """Also of one token, for which XLA would bring the table to every device of some platforms."""
    here = sharding((1, 2, 4))
    table = here.place(tag(jnp.zeros((VOCABULARY, HIDDEN), jnp.float32), "voc", "d"))
    call = jax.jit(lambda table, tokens: embed(table, tokens, here))
    program = call.lower(table, tag(jnp.zeros(shape, jnp.int32), "b", "s")).as_text()
    gathers = [line for line in program.splitlines() if "stablehlo.gather" in line]
    assert len(gathers) == 1 and f"tensor<{VOCABULARY // 8}x{HIDDEN}xf32>" in gathers[0]

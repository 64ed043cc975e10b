"""Attention on an NVIDIA GPU, against float64: `JAX_PLATFORMS=cuda pytest <this file>`."""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case

from moe_jax.kernels.attention import attend

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")

SHAPES = {
    "prompt": oracle.sequence(0, 200, 200),
    "chunk": oracle.sequence(70, 40, 130),
    "token": oracle.sequence(140, 1, 1000),
    "first token": oracle.sequence(0, 1, 70),
    "ring": oracle.ring(19, 150, 8),
    "ring, not full": oracle.ring(3, 70, 8),
}


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("kv", "group", "head_dim", "dtype"),
    [(2, 8, 64, jnp.bfloat16), (3, 1, 20, jnp.float16), (1, 5, 128, jnp.bfloat16)],
)
def test_values(rng, name, window, kv, group, head_dim, dtype):
    case = Case.random(
        rng, *SHAPES[name], kv=kv, group=group, head_dim=head_dim, window=window, dtype=dtype
    )
    out = jax.jit(
        lambda *operands: attend(*operands, window=window, implementation="triton")
    )(*case.tagged(dtype))  # fmt: skip
    assert out.dtype == dtype
    found, expected = np.asarray(out.array, np.float64), case.expected()
    assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)


def test_the_same_bits_again(rng):
    case = Case.random(
        rng, *oracle.sequence(900, 1, 1000), kv=2, group=8, head_dim=64, window=None,
        dtype=jnp.bfloat16,
    )  # fmt: skip
    call = jax.jit(lambda *operands: attend(*operands).array)
    first, second = (np.asarray(call(*case.tagged(jnp.bfloat16))) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))

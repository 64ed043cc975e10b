"""What tests of the command run under, besides what all tests do."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def little_compiling() -> Iterator[None]:
    """XLA optimizes little: layers are tiny, run once, and to compile them is what takes time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

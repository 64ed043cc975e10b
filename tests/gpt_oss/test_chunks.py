"""In which chunks a prompt is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_oss.chunks import MOST_PREFILL_TOKENS, choose_chunk, prefill_chunks

SIZES = (4, 16, 64)


@pytest.mark.parametrize(
    ("left", "size"),
    [(1, 4), (4, 4), (5, 4), (8, 16), (16, 16), (17, 16), (31, 16), (32, 64), (64, 64), (900, 64)],
)
def test_the_smallest_that_holds_them_or_the_largest_that_they_fill(left: int, size: int) -> None:
    assert choose_chunk(SIZES, left) == size


@given(left=st.integers(1, 10_000), batch=st.integers(1, 64), kernels=st.booleans())
def test_little_is_computed_in_vain(left: int, batch: int, kernels: bool) -> None:
    sizes, taken = prefill_chunks(batch, kernels), 0
    while taken < left:
        taken += choose_chunk(sizes, left - taken)
    assert taken <= max(2 * left, sizes[0])


def test_long_chunks_are_for_kernels_and_few_rows() -> None:
    assert prefill_chunks(1, kernels=False) == (32, 128, 512)
    assert prefill_chunks(1, kernels=True) == (32, 128, 512, 2048, 8192)
    assert prefill_chunks(4, kernels=True) == (32, 128, 512, 2048)
    assert prefill_chunks(8, kernels=True) == (32, 128, 512)
    assert all(size * 3 <= MOST_PREFILL_TOKENS for size in prefill_chunks(3, kernels=True))

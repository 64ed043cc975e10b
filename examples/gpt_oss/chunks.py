"""In which chunks a prompt is taken: a few fixed sizes, so that prompts share a few programs."""

from collections.abc import Sequence

PREFILL_CHUNKS = (32, 128, 512)
"""Prompt tokens of a row taken at a time."""

LONG_PREFILL_CHUNKS = (2048, 8192)
"""Further ones, where attention has a kernel, which passes over the keys that a window hides."""

MOST_PREFILL_TOKENS = 8192
"""Most tokens of a long chunk, of all rows together."""


def prefill_chunks(batch: int, kernels: bool) -> tuple[int, ...]:
    """The sizes of chunks for so many rows, ascending; `kernels` says whether attention has one."""
    longer = LONG_PREFILL_CHUNKS if kernels else ()
    return PREFILL_CHUNKS + tuple(s for s in longer if s * batch <= MOST_PREFILL_TOKENS)


def choose_chunk(sizes: Sequence[int], left: int) -> int:
    """The next chunk of so many tokens: the smallest that holds them, if they fill half of it.

    Otherwise the largest that they fill, or the smallest of all. `sizes` are ascending.
    """
    holding = next((size for size in sizes if size >= left), None)
    filled = [size for size in sizes if size <= left]
    if holding is not None and (holding <= 2 * left or not filled):
        return holding
    return filled[-1]

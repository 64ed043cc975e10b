"""Caches against a plain list of everything seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_oss.cache import Cache, FullCache, RingCache, Seen, Span
from moe_jax import Tagged, tag
from moe_jax.kernels.attention import EMPTY, visible

WINDOW, CONTEXT, KV, HD = 5, 24, 2, 3


def empty(kind: type[FullCache] | type[RingCache], slots: int, batch: int) -> FullCache | RingCache:
    return kind(
        *(tag(jnp.full((batch, KV, slots, HD), jnp.nan), "b", "kv", "k", "hd") for _ in range(2))
    )


def marked(position: np.ndarray, row: int) -> np.ndarray:
    """Keys [kv, k, hd] that tell row, head, position and feature; values are their negatives."""
    parts = np.meshgrid(np.arange(KV), position, np.arange(HD), indexing="ij")
    return (parts[1] + 100 * parts[0] + 1000 * row + 0.1 * parts[2]).astype(np.float32)


@jax.jit
def extended(cache: FullCache | RingCache, new: Tagged, span: Span):
    return cache.extend(new, new.map(jnp.negative), span, None)


def extend(
    cache: FullCache | RingCache, start: np.ndarray, count: np.ndarray, size: int
) -> tuple[Seen, FullCache | RingCache]:
    """Adds `size` tokens a row, of which `count` are real and the rest NaN."""
    keys = np.full((len(start), KV, size, HD), np.nan, np.float32)
    for row, (first, real) in enumerate(zip(start, count, strict=True)):
        keys[row, :, :real] = marked(first + np.arange(real), row)
    span = Span(*(tag(jnp.asarray(x, jnp.int32), "b") for x in (start, count)))
    new = tag(jnp.asarray(keys), "b", "kv", "k", "hd")
    return extended(cache, new, span)


def check(seen: Seen, start: np.ndarray, count: np.ndarray, size: int, window: int | None) -> None:
    """Every real query sees each position it should exactly once, with that position's key."""
    at = start[:, None] + np.arange(size)[None, :]
    mask = visible(tag(jnp.asarray(at), "b", "q"), seen.positions, window).array
    for row in range(len(start)):
        for query in range(count[row]):
            slots = np.flatnonzero(mask[row, query])
            positions = np.asarray(seen.positions.array[row])[slots]
            q = start[row] + query
            first = 0 if window is None else max(0, q - window + 1)
            assert sorted(positions.tolist()) == list(range(first, q + 1))
            keys = np.asarray(seen.keys.array[row])[:, slots]
            np.testing.assert_array_equal(keys, marked(positions, row))
            np.testing.assert_array_equal(np.asarray(seen.values.array[row])[:, slots], -keys)


def run(kind: type[FullCache] | type[RingCache], chunks: list[tuple[int, np.ndarray]]) -> None:
    window = WINDOW if kind is RingCache else None
    cache = empty(kind, window or CONTEXT, len(chunks[0][1]))
    start = np.zeros(len(chunks[0][1]), np.int64)
    for size, count in chunks:
        seen, cache = extend(cache, start, count, size)
        check(seen, start, count, size, window)
        start = start + count


@pytest.mark.parametrize("kind", [FullCache, RingCache])
@pytest.mark.parametrize("first", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 3])
@pytest.mark.parametrize("second", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1])
def test_chunks_around_the_window(
    kind: type[FullCache] | type[RingCache], first: int, second: int
) -> None:
    run(kind, [(size, np.asarray([size])) for size in (first, second, 1, 1)])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([FullCache, RingCache]),
    st.lists(
        st.tuples(
            st.sampled_from([1, 3, 6, 8]), st.lists(st.integers(0, 8), min_size=3, max_size=3)
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_rows_of_different_length(
    kind: type[FullCache] | type[RingCache], chunks: list[tuple[int, list[int]]]
) -> None:
    """Any chunks with any padding, rows without a real token included."""
    run(kind, [(size, np.minimum(count, size)) for size, count in chunks])


def test_nothing_is_written_past_the_context() -> None:
    cache = empty(FullCache, 4, 1)
    _, cache = extend(cache, np.asarray([0]), np.asarray([3]), 3)
    _, cache = extend(cache, np.asarray([3]), np.asarray([2]), 2)
    np.testing.assert_array_equal(cache.keys.array[0], marked(np.arange(4), 0))


def test_reach_leaves_slots_out() -> None:
    cache = empty(FullCache, CONTEXT, 1)
    new = tag(jnp.asarray(marked(np.arange(3), 0)[None]), "b", "kv", "k", "hd")
    span = Span(tag(jnp.zeros(1, jnp.int32), "b"), tag(jnp.full(1, 3, jnp.int32), "b"))
    seen, _ = cache.extend(new, new, span, 4)
    assert seen.positions.array.tolist() == [[0, 1, 2, EMPTY]]
    assert seen.keys.size("k") == 4


def test_sliding_layers_hold_their_window_only() -> None:
    config = tiny_model.config("long_context")
    cache = Cache.empty(config, 3, 4096, jnp.bfloat16)
    assert [layer.keys.size("k") for layer in cache.layers] == [128, 4096]
    assert [type(layer) for layer in cache.layers] == [RingCache, FullCache]
    assert cache.layers[0].keys.sizes == {"b": 3, "kv": 1, "k": 128, "hd": 24}
    assert cache.layers[0].values.dtype == jnp.bfloat16
    assert cache.lengths.array.tolist() == [0, 0, 0]
    small = Cache.empty(config, 1, 64, jnp.float32)
    assert [layer.keys.size("k") for layer in small.layers] == [64, 64]


def test_donated_caches_are_written_in_place() -> None:
    cache = Cache.empty(tiny_model.config("released_numbers"), 1, CONTEXT, jnp.float32)
    keys = tag(jnp.ones((1, 2, 1, 20)), "b", "kv", "k", "hd")

    def write(layers: tuple[FullCache | RingCache, ...], lengths: Tagged, keys: Tagged):
        span = Span(lengths, lengths.map(jnp.ones_like))
        return [layer.extend(keys, keys, span, None)[1] for layer in layers]

    step = jax.jit(write, donate_argnums=0).lower(cache.layers, cache.lengths, keys).compile()
    analysis = step.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    assert analysis is not None
    assert analysis.alias_size_in_bytes == size
    assert analysis.temp_size_in_bytes < size / 4


@pytest.mark.parametrize(
    ("batch", "context", "message"),
    [
        (0, 8, "batch must be at least 1, got 0"),
        (1, 0, "context must be between 1 and .* 131072, got 0"),
        (1, 131073, "context must be between 1 and .* 131072, got 131073"),
    ],
)
def test_sizes_are_checked(batch: int, context: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cache.empty(tiny_model.config("released_numbers"), batch, context, jnp.float32)


def test_pieces_of_a_span() -> None:
    span = Span(*(tag(jnp.asarray(x, jnp.int32), "b") for x in ([5, 0, 9], [6, 3, 0])))
    first, second = span.piece(0, 4), span.piece(4, 4)
    assert first.start.array.tolist() == [5, 0, 9] and first.count.array.tolist() == [4, 3, 0]
    assert second.start.array.tolist() == [9, 3, 9] and second.count.array.tolist() == [2, 0, 0]

"""Generation: prompt ids in, token ids out. The engine knows nothing of text.

A prompt is taken in chunks of a few fixed sizes, so that prompts of all lengths share a few
compiled programs. Decoding runs many tokens in one loop on the device and comes back with a block:
of one token first, then of up to twice as many each time, so that a stream starts at once and a
fast device is not kept waiting later. A slow one gives its tokens one by one.

    engine = Engine(model, context=4096)
    generation = engine.generate(prompt_ids, Sampler(temperature=0.7), seed=1)
    for token in generation: ...
    print(generation.statistics.decoding.per_second)
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt_oss.cache import Cache
from gpt_oss.chunks import choose_chunk, prefill_chunks
from gpt_oss.generation import Clock, FinishReason, Generation, Request, Statistics, Stream
from gpt_oss.model import GptOss
from gpt_oss.placement import on_every_device
from gpt_oss.programs import Program
from gpt_oss.sampling import Greedy, Sampler, Sampling
from moe_jax.kernels.lowering import has_kernels
from moe_jax.sharding import Sharding
from moe_jax.tagged import Tagged, tag

BLOCK = 32
"""Most tokens decoded before the host sees them."""

BLOCK_SECONDS = 0.1
"""How long a block should take at most, unless it is of one token."""

_REACHES = (1024, 4096, 16384, 65536)
_STOP_MULTIPLE = 8
_NOTHING = -1

type _Block = tuple[list[list[int]], list[FinishReason | None]]
"""The new tokens of each row, and why it ended."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Wishes:
    """What the rows want: how to choose, most tokens {b}, stop ids {b, stop} filled with -1."""

    sampling: Sampling
    limit: Tagged
    stop: Tagged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where decoding stands: the last token {b} is not in the cache yet.

    `index` {b} counts the tokens chosen; `done` {b} rows take no further part.
    """

    cache: Cache
    token: Tagged
    index: Tagged
    done: Tagged


class Engine:
    """Runs a model.

    Attributes:
        context: most tokens of a sequence, prompt and answer together.
        batch: most sequences at a time.
        vocab_size: ids are below it.
    """

    def __init__(self, model: GptOss, *, context: int, batch: int = 1) -> None:
        """Takes a model; its parameters may lie on several devices.

        Args:
            model: the model.
            context: most tokens of a sequence, prompt and answer together; full layers hold
                keys and values of this length.
            batch: most sequences at a time.

        Raises:
            ValueError: a size is below 1 or `context` passes the model's longest sequence.
        """
        jax.eval_shape(lambda: model.empty_cache(batch, context))
        self.context, self.batch, self.vocab_size = context, batch, model.config.vocab_size
        self._stop_ids = model.config.eos_token_ids
        leaves, treedef = jax.tree.flatten(model)
        on_gpus = all(has_kernels(leaf.devices()) for leaf in leaves)
        self._chunks = prefill_chunks(batch, on_gpus and model.dtype == jnp.bfloat16)
        self._new_cache = Program(lambda: model.empty_cache(batch, context))
        self._prefill = Program(
            _on_model(_prefill, treedef), leaves, static=("reach",), donate=(1, 2)
        )
        self._decode = Program(_on_model(_decode, treedef), leaves, static=("reach",), donate=(1,))
        self._first = Program(functools.partial(_first_token, model.sharding), donate=(0,))

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampler: Greedy | Sampler = Greedy(),  # noqa: B008 - frozen
        *,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Generation:
        """Continues one prompt; see `Request` for the arguments and `stream` for errors."""
        request = Request(prompt_ids, sampler, max_tokens, stop_ids, seed)
        blocks, statistics = self._begin([request])

        def tokens() -> Iterator[int]:
            for [row], reasons in blocks:
                for left, token in zip(reversed(range(len(row))), row, strict=True):
                    statistics.generated_tokens += 1
                    if not left:
                        statistics.finish_reasons = reasons
                    yield token

        return Generation(tokens(), statistics)

    def stream(self, requests: Sequence[Request]) -> Stream:
        """Continues several prompts at once, of different lengths and with different wishes.

        Raises:
            ValueError: there are no or too many requests, a prompt is empty or holds an id that
                is not in the vocabulary, or prompt and `max_tokens` do not fit the context.
            TypeError: a value is of another type.
        """
        blocks, statistics = self._begin(requests)

        def taken() -> Iterator[list[list[int]]]:
            for block, reasons in blocks:
                statistics.generated_tokens += sum(map(len, block))
                statistics.finish_reasons = reasons
                yield block

        return Stream(taken(), statistics)

    def _begin(self, requests: Sequence[Request]) -> tuple[Iterator[_Block], Statistics]:
        """Checks the requests; returns what `_run` gives and the statistics that it fills."""
        if not 1 <= len(requests) <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} requests, got {len(requests)}")
        limits = [self._check(request) for request in requests]
        wishes = self._wishes(requests, limits)
        statistics = Statistics(
            prompt_tokens=sum(len(request.prompt_ids) for request in requests),
            finish_reasons=[None] * len(requests),
        )
        return self._run(requests, limits, wishes, Clock(statistics)), statistics

    def _check(self, request: Request) -> int:
        """Checks a request and returns the most tokens it may generate."""
        ids, most = request.prompt_ids, request.max_tokens
        if len(ids) == 0:
            raise ValueError("the prompt has no tokens: expected at least one")
        for what, given in (("prompt", ids), ("stop", request.stop_ids or ())):
            for token in given:
                if not isinstance(token, int | np.integer) or isinstance(token, bool):
                    raise TypeError(f"{what} ids must be integers, got {token!r}")
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{what} ids must be at least 0 and below the vocabulary's size "
                        f"{self.vocab_size}, got {token}"
                    )
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context} and needs "
                f"room for an answer: shorten the prompt or enlarge the context"
            )
        if most is None:
            return room
        if not isinstance(most, int) or isinstance(most, bool):
            raise TypeError(f"max_tokens must be an integer or None, got {most!r}")
        if not 1 <= most <= room:
            raise ValueError(
                f"max_tokens must be between 1 and {room} (a context of {self.context} less a "
                f"prompt of {len(ids)}), got {most}"
            )
        return most

    def _wishes(self, requests: Sequence[Request], limits: Sequence[int]) -> _Wishes:
        idle = self.batch - len(requests)
        sampling = Sampling.of(
            [request.sampler for request in requests] + [Greedy()] * idle,
            [request.seed for request in requests] + [0] * idle,
        )
        stops = [self._stops(request) for request in requests]
        width = max(map(len, stops))
        stop = np.full((self.batch, width + -width % _STOP_MULTIPLE), _NOTHING, np.int32)
        for row, ids in enumerate(stops):
            stop[row, : len(ids)] = ids
        limit = np.zeros(self.batch, np.int32)
        limit[: len(limits)] = limits
        return _Wishes(sampling, tag(jnp.asarray(limit), "b"), tag(jnp.asarray(stop), "b", "stop"))

    def _stops(self, request: Request) -> list[int]:
        return list(self._stop_ids if request.stop_ids is None else request.stop_ids)

    def _run(
        self, requests: Sequence[Request], limits: Sequence[int], wishes: _Wishes, clock: Clock
    ) -> Iterator[_Block]:
        """Prefills, then yields blocks of new tokens until all rows are done."""
        statistics, rows = clock.statistics, len(requests)
        begin = time.perf_counter()
        cache, logits = self._take_prompts([r.prompt_ids for r in requests], clock)
        state = clock.run(self._first, cache, logits, wishes)
        block = [[int(token)] for token in np.asarray(state.token.array)[:rows]]
        statistics.first_token_seconds = time.perf_counter() - begin
        reasons: list[FinishReason | None] = [None] * rows
        counts, steps = [1] * rows, 1
        stops = [set(self._stops(request)) for request in requests]
        while True:
            for row, new in enumerate(block):
                if new and new[-1] in stops[row]:
                    reasons[row] = "stop"
                elif new and counts[row] == limits[row]:
                    reasons[row] = "length"
            yield block, list(reasons)
            if None not in reasons:
                return
            longest = max(
                len(request.prompt_ids) + count
                for request, count in zip(requests, counts, strict=True)
            )
            reach = self._reach(longest + steps)
            state, tokens = clock.run(self._decode, state, wishes, np.int32(steps), reach=reach)
            block = [
                [t for t in row if t != _NOTHING] for row in np.asarray(tokens)[:rows].tolist()
            ]
            clock.count(statistics.decoding, sum(map(len, block)))
            counts = [count + len(new) for count, new in zip(counts, block, strict=True)]
            # several processes must take as many steps each, whatever their clocks say
            steps = _next_steps(steps, clock.seconds if jax.process_count() == 1 else 0.0)

    def _take_prompts(
        self, prompts: Sequence[Sequence[int]], clock: Clock
    ) -> tuple[Cache, jax.Array]:
        """The cache after the prompts, and the logits [b, voc] that follow each."""
        cache = clock.run(self._new_cache)
        logits = jnp.zeros((self.batch, self.vocab_size), jnp.float32)
        longest, start = max(map(len, prompts)), 0
        while start < longest:
            left = longest - start
            size = choose_chunk(self._chunks, left)
            tokens = np.zeros((self.batch, size), np.int32)
            count = np.zeros(self.batch, np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[start : start + size]
                tokens[row, : len(piece)], count[row] = piece, len(piece)
            reach = self._reach(min(start + size, self.context))
            cache, logits = clock.run(self._prefill, cache, logits, tokens, count, reach=reach)
            clock.count(clock.statistics.prefill, int(count.sum()))
            start += size
        return cache, logits

    def _reach(self, length: int) -> int:
        """How far full layers look: a few sizes, so that few programs are compiled."""
        return min(next((r for r in _REACHES if r >= length), self.context), self.context)


def _next_steps(steps: int, seconds: float) -> int:
    """Steps of the next block, after so many that took so long: a power of two, or BLOCK."""
    allowed = min(2 * steps, BLOCK)
    while allowed > 1 and allowed * seconds > BLOCK_SECONDS * steps:
        allowed //= 2
    return allowed


def _on_model(function: Callable[..., Any], treedef: Any) -> Callable[..., Any]:
    """Lets `function` take the model as its leaves, which saves walking through it at each call."""

    def called(leaves: list[jax.Array], *args: Any, **options: Any) -> Any:
        return function(jax.tree.unflatten(treedef, leaves), *args, **options)

    return called


def _prefill(
    model: GptOss,
    cache: Cache,
    logits: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    *,
    reach: int,
) -> tuple[Cache, jax.Array]:
    """One chunk [b, s] with count [b] real tokens a row; rows with none keep their logits."""
    new, cache = model.step(tag(tokens, "b", "s"), cache, count=tag(count, "b"), reach=reach)
    return cache, jnp.where(count[:, None] > 0, new.untag("b", "voc"), logits)


def _first_token(
    sharding: Sharding | None, cache: Cache, logits: jax.Array, wishes: _Wishes
) -> _State:
    index = cache.lengths.map(jnp.zeros_like)
    token = on_every_device(wishes.sampling.choose(tag(logits, "b", "voc"), index), sharding)
    idle = wishes.limit.map(lambda limit: limit == 0)
    return _advance(_State(cache, token, index, idle), cache, token, wishes)


def _advance(state: _State, cache: Cache, token: Tagged, wishes: _Wishes) -> _State:
    """The state after `token` {b}, which rows that are done do not take."""
    done, new = state.done.untag("b"), token.untag("b")
    index = state.index.untag("b") + jnp.where(done, 0, 1)
    stopped = (new[:, None] == wishes.stop.untag("b", "stop")).any(-1)
    return _State(
        cache,
        tag(jnp.where(done, state.token.untag("b"), new), "b"),
        tag(index, "b"),
        tag(done | stopped | (index >= wishes.limit.untag("b")), "b"),
    )


def _decode(
    model: GptOss, state: _State, wishes: _Wishes, steps: jax.Array, *, reach: int
) -> tuple[_State, jax.Array]:
    """Up to `steps` tokens a row, int32 [b, BLOCK] filled with -1, and the state after them."""
    batch = state.token.size("b")

    def running(carry: tuple[jax.Array, _State, jax.Array]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1].done.array.all()

    def one(carry: tuple[jax.Array, _State, jax.Array]) -> tuple[jax.Array, _State, jax.Array]:
        step, state, tokens = carry
        # A batch of one ends with its only row; more rows have some that are done before others.
        count = None if batch == 1 else state.done.map(lambda d: jnp.where(d, 0, 1))
        last = tag(state.token.untag("b")[:, None], "b", "s")
        logits, cache = model.step(last, state.cache, count=count, reach=reach)
        token = on_every_device(wishes.sampling.choose(logits, state.index), model.sharding)
        shown = jnp.where(state.done.array, _NOTHING, token.array)
        tokens = lax.dynamic_update_slice_in_dim(tokens, shown[:, None], step, axis=1)
        return step + 1, _advance(state, cache, token, wishes), tokens

    empty = jnp.full((batch, BLOCK), _NOTHING, jnp.int32)
    _, state, tokens = lax.while_loop(running, one, (jnp.asarray(0, jnp.int32), state, empty))
    return state, on_every_device(tag(tokens, "b", "s"), model.sharding).array

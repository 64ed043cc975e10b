"""What is asked of the engine, and what it gives back: requests, token streams, statistics."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from gpt_oss.programs import Program
from gpt_oss.sampling import Greedy, Sampler

type FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one row of a batch is to generate.

    Attributes:
        prompt_ids: token ids, at least one.
        sampler: how tokens are chosen.
        max_tokens: most tokens to generate; None for as many as the context holds.
        stop_ids: ids that end the sequence; None for those of the model's configuration, () for
            none. The id that stopped it is the last one generated.
        seed: at least 0, below 2^63; the same seed gives the same tokens.
    """

    prompt_ids: Sequence[int]
    sampler: Greedy | Sampler = Greedy()
    max_tokens: int | None = None
    stop_ids: Sequence[int] | None = None
    seed: int = 0


@dataclasses.dataclass
class Rate:
    """Work and the time it took, compilation left out.

    Attributes:
        tokens: how many.
        seconds: in how long.
    """

    tokens: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float | None:
        """Tokens per second; None where nothing was measured."""
        return self.tokens / self.seconds if self.seconds else None


@dataclasses.dataclass
class Statistics:
    """What a generation took, over all rows.

    Attributes:
        prompt_tokens: tokens of the prompts.
        generated_tokens: tokens that the caller took, stop tokens included.
        compile_seconds: compilation of programs not used before.
        first_token_seconds: from the start to the first token, compilation included; None before.
        prefill: prompt tokens.
        decoding: tokens after the first of each row, without the caller's time between blocks;
            those of a block that the caller left are among them.
        finish_reasons: for each row `stop`, `length`, or None while its last token is not taken.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    compile_seconds: float = 0.0
    first_token_seconds: float | None = None
    prefill: Rate = dataclasses.field(default_factory=Rate)
    decoding: Rate = dataclasses.field(default_factory=Rate)
    finish_reasons: list[FinishReason | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Stream:
    """Blocks of new tokens of a batch, while they are made.

    Attributes:
        blocks: gives, for each block, a list of new token ids for each request.
        statistics: grows with the blocks taken.
    """

    blocks: Iterator[list[list[int]]]
    statistics: Statistics

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self.blocks

    def collect(self) -> list[list[int]]:
        """All tokens of each request."""
        rows: list[list[int]] = [[] for _ in self.statistics.finish_reasons]
        for block in self.blocks:
            for row, new in zip(rows, block, strict=True):
                row.extend(new)
        return rows


@dataclasses.dataclass
class Generation:
    """Tokens of one request, while they are made.

    Attributes:
        tokens: gives token ids one by one.
        statistics: grows with the tokens taken.
    """

    tokens: Iterator[int]
    statistics: Statistics

    def __iter__(self) -> Iterator[int]:
        return self.tokens

    def __next__(self) -> int:
        return next(self.tokens)


class Clock:
    """Runs programs and adds the time to the statistics.

    Attributes:
        statistics: what it adds to.
        seconds: how long the last run took, compilation left out.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.seconds = 0.0

    def run(self, program: Program, *args: Any, **static: Any) -> Any:
        """Compiles if need be, runs, and waits for the result."""
        call, compile_seconds = program.prepare(*args, **static)
        self.statistics.compile_seconds += compile_seconds
        begin = time.perf_counter()
        result = jax.block_until_ready(call())
        self.seconds = time.perf_counter() - begin
        return result

    def count(self, rate: Rate, tokens: int) -> None:
        """Adds the last run, which took so many tokens, to a rate."""
        rate.tokens += tokens
        rate.seconds += self.seconds

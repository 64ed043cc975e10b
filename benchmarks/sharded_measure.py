"""What `sharded.py` measures of a whole model on one mesh, and how results are held to one device.

Decoding goes on from a cache that is full up to a position, so that no prompt has to be taken. To
be checked it starts from nothing instead, with a token for each row: the rows must go on as they do
on one device. Where a token differs, the two likeliest logits there must lie nearer to each other
than the noise allows, which is measured as well: by the logits of a forward pass on both.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sharded_floors import Rates, Step, floors, microseconds
from sharded_model import MeshModel, Prompts, compile_all
from sharded_profile import DeviceTimes, trace
from timing import reason, summary

CHECKED_ROWS = 4
"""Of a batch, that are held to one device; as many prompts are given to the forward pass."""

_NOISE = 8.0  # distance of two logits that may change places, in mean errors of a logit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure on each mesh.

    Attributes:
        batches: rows to decode at a time.
        context: tokens of each before those that are decoded.
        steps: tokens of each row that one call decodes.
        prompts: what to prefill.
        samples: calls to time.
        row_seconds: no call is begun after so many seconds of timing a row.
        tolerance: largest relative error of logits against one device.
        threads: programs to compile at a time.
    """

    batches: tuple[int, ...]
    context: int
    steps: int
    prompts: tuple[Prompts, ...]
    samples: int
    row_seconds: float
    tolerance: float
    threads: int


class Reference:
    """Results of one device, kept in a file so that a later run can be held to them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._arrays: dict[str, np.ndarray] = {}
        if path is not None and path.exists():
            with np.load(path) as found:
                self._arrays = dict(found)

    def get(self, name: str) -> np.ndarray | None:
        return self._arrays.get(name)

    def put(self, **arrays: np.ndarray) -> None:
        self._arrays |= arrays
        if self._path is not None:
            np.savez(self._path, **self._arrays)  # pyright: ignore[reportArgumentType]


class Measurement:
    """The programs of one mesh, compiled, and what they are asked."""

    def __init__(self, model: MeshModel, plan: Plan, reference: Reference) -> None:
        """Compiles everything that `plan` asks for."""
        self._model, self._plan, self._reference = model, plan, reference
        self._is_reference = model.sharding is None
        most = max((*plan.batches, CHECKED_ROWS))
        self._tokens, self._shifts = self._random(0, most), self._random(1, most)
        self._checked = self._random(2, CHECKED_ROWS, plan.steps)
        self._logits_error = float("nan")
        begin = time.perf_counter()
        self._compile()
        self.compile_seconds = time.perf_counter() - begin

    def _random(self, seed: int, *shape: int) -> np.ndarray:
        """Token ids; the first ones are the same whatever the size."""
        rng = np.random.default_rng(seed)
        return rng.integers(self._model.config.vocab_size, size=shape).astype(np.int32)

    def _compile(self) -> None:
        model, plan = self._model, self._plan
        lowered: dict[Any, Any] = {"forward": model.forward(2 * CHECKED_ROWS, plan.steps)}
        for batch in plan.batches:
            layers = model.cache(batch, plan.context + plan.steps)
            lowered[batch] = model.decode(layers, batch, plan.steps)
        for prompts in plan.prompts:
            layers = model.cache(prompts.rows, prompts.length)
            for reach in sorted({reach for _, reach in prompts.calls()}):
                lowered[prompts, reach] = model.prefill(layers, prompts, reach)
        programs = compile_all(list(lowered.values()), plan.threads)
        self._programs = dict(zip(lowered, programs, strict=True))

    def rows(self, sizes: dict[str, int], ceilings: Any, rates: Rates) -> Iterator[dict[str, Any]]:
        """A row for each batch, then for each set of prompts; what fails says why."""
        common = {"mesh": sizes, "devices": int(np.prod(list(sizes.values())))}
        config = self._model.config
        width = self._model.model.dtype.itemsize
        try:
            found = self._check_forward()
        except Exception as error:
            found = {"absent": reason(error)}
        yield {**common, "phase": "forward", "rows": CHECKED_ROWS, **found}
        for named, step, calls, measure in self._tasks():
            begin = time.perf_counter()
            try:
                measured = measure()
            except Exception as error:
                yield {**common, **named, "absent": reason(error)}
                continue
            needed = floors(config, sizes, step, calls=calls, bytes_per_float=width)
            least = microseconds(needed, ceilings, rates)
            tokens = named.get("batch") or named["tokens"]
            yield {
                **common,
                **named,
                "tokens_per_second": tokens / measured["us"] * 1e6,
                "spread": [tokens / measured[key] * 1e6 for key in ("p90", "p10")],
                **measured,
                **least,
                "floor_tokens_per_second": tokens / least["floor_us"] * 1e6,
                "floor_bytes": needed.bytes,
                "floor_operations": needed.operations,
                "sent": [dataclasses.asdict(one) for one in needed.collectives],
                "seconds": time.perf_counter() - begin,
            }

    def _tasks(self) -> Iterator[tuple[dict[str, Any], Step, int, Callable[[], dict[str, Any]]]]:
        """What a row is called, what it does, in how many calls, and the function that measures."""
        plan = self._plan
        for batch in plan.batches:
            named = {"phase": "decode", "batch": batch, "context": plan.context}
            step = Step(batch, 1, plan.context + plan.steps // 2)
            yield named, step, 1, functools.partial(self._decode, batch)
        for prompts in plan.prompts:
            named = {"phase": "prefill", "tokens": prompts.tokens, "rows": prompts.rows}
            named["chunk"] = prompts.chunk
            step = Step(prompts.rows, prompts.length, 0)
            yield named, step, len(prompts.calls()), functools.partial(self._prefill, prompts)

    def profile(self, folder: Path) -> Iterator[tuple[str, list[DeviceTimes]]]:
        """Traces of one step of the largest batch and the smallest, and of the first prompts."""
        plan = self._plan
        for batch in sorted({*plan.batches[:1], *plan.batches[-1:]}):
            call = self._decoder(batch)
            call(plan.context, self._shifts[:batch], 1)
            step = functools.partial(call, plan.context, self._shifts[:batch], 1)
            yield f"decode {batch}", trace(folder / f"decode_{batch}", step)
        for prompts in plan.prompts[:1]:
            call = self._prefiller(prompts)
            jax.block_until_ready(call())
            shape = f"{prompts.rows}x{prompts.length}"
            yield f"prefill {shape}", trace(folder / f"prefill_{shape}", call)

    def _check_forward(self) -> dict[str, Any]:
        logits, _ = self._forward(self._checked[:0])
        checked = self._check_logits(f"forward_{self._plan.steps}", logits)
        self._logits_error = checked.get("mean_error", self._logits_error)
        return checked

    def _check_logits(self, name: str, logits: np.ndarray) -> dict[str, Any]:
        if self._is_reference:
            self._reference.put(**{name: logits})
        expected = self._reference.get(name)
        if expected is None or expected.shape != logits.shape:
            return {"same": None}
        error = relative_error(logits, expected)
        return {
            "same": error <= self._plan.tolerance,
            "error": error,
            "mean_error": float(np.sqrt(np.mean((logits - expected) ** 2))),
            "tolerance": self._plan.tolerance,
        }

    def _forward(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits [4, voc] after the fixed prompts, and the margins [rows, s] of `sequences`."""
        spare = CHECKED_ROWS - len(sequences)
        tokens = np.concatenate([sequences, self._checked[:spare], self._checked])
        logits, margins = self._model.run(self._programs["forward"], tokens)
        return np.asarray(logits)[CHECKED_ROWS:], np.asarray(margins)[: len(sequences)]

    def _decode(self, batch: int) -> dict[str, Any]:
        plan, call = self._plan, self._decoder(batch)
        tokens = call(0, np.zeros(batch, np.int32), plan.steps)
        checked = self._check_decode(batch, tokens)
        call = self._decoder(batch)
        times = _timed(lambda: call(plan.context, self._shifts[:batch], plan.steps), plan)
        return {**{key: us / plan.steps for key, us in times.items()}, **checked}

    def _decoder(self, batch: int) -> Callable[[int, np.ndarray, int], np.ndarray]:
        """A function (start, shift, steps) -> tokens on a cache of its own."""
        model, program, count = self._model, self._programs[batch], np.ones(batch, np.int32)
        layers = [model.cache(batch, self._plan.context + self._plan.steps)]

        def call(start: int, shift: np.ndarray, steps: int) -> np.ndarray:
            begin = np.int32(start), self._tokens[:batch], shift, count, np.int32(steps)
            layers[0], tokens = model.run(program, layers[0], *begin)
            return np.asarray(tokens)

        return call

    def _check_decode(self, batch: int, tokens: np.ndarray) -> dict[str, Any]:
        tokens = tokens[:CHECKED_ROWS]
        fed = np.concatenate([self._tokens[: len(tokens), None], tokens[:, :-1]], axis=1)
        if self._is_reference:
            margins = self._forward(fed)[1]
            self._reference.put(**{f"tokens_{batch}": tokens, f"margins_{batch}": margins})
        expected = self._reference.get(f"tokens_{batch}")
        margins = self._reference.get(f"margins_{batch}")
        if expected is None or margins is None or expected.shape != tokens.shape:
            return {"same": None}
        return agreement(tokens, expected, margins, _NOISE * self._logits_error)

    def _prefill(self, prompts: Prompts) -> dict[str, Any]:
        call = self._prefiller(prompts)
        logits = np.asarray(call())[:CHECKED_ROWS]
        checked = self._check_logits(f"prefill_{prompts.rows}x{prompts.length}", logits)
        return {**_timed(call, self._plan), **checked}

    def _prefiller(self, prompts: Prompts) -> Callable[[], jax.Array]:
        """A function that takes all chunks of some prompts and returns logits [b, voc]."""
        model = self._model
        shape = prompts.rows, prompts.length
        tokens = self._random(3, *shape)
        count = np.full(prompts.rows, prompts.chunk, np.int32)
        layers = [model.cache(*shape)]

        def call() -> jax.Array:
            logits: Any = None
            for start, reach in prompts.calls():
                chunk = np.int32(start), tokens[:, start : start + prompts.chunk], count
                program = self._programs[prompts, reach]
                layers[0], logits = model.run(program, layers[0], *chunk)
            return logits

        return call


def agreement(
    tokens: np.ndarray, expected: np.ndarray, margins: np.ndarray, allowed: float
) -> dict[str, Any]:
    """How far tokens [b, s] are those expected; a row counts up to the first that differs.

    Args:
        tokens: found.
        expected: those of one device.
        margins: by how much each of these was the likeliest.
        allowed: the largest margin at which another one may be taken.
    """
    differs = tokens != expected
    first = np.where(differs.any(1), differs.argmax(1), tokens.shape[1])
    at = [margins[row, step] for row, step in enumerate(first) if step < tokens.shape[1]]
    return {
        "same": all(margin <= allowed for margin in at),
        "tokens_agreed": int(first.sum()),
        "tokens_checked": int(tokens.size),
        "margins_where_they_differ": [float(margin) for margin in at],
        "margin_allowed": allowed,
    }


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference by that of what is expected; NaN where one is NaN."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def _timed(call: Callable[[], Any], plan: Plan) -> dict[str, float]:
    """Median, 10th and 90th percentile of a call in microseconds, after one that is not counted."""
    jax.block_until_ready(call())
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < plan.samples:
        if taken and time.perf_counter() - begin > plan.row_seconds:
            break
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append((time.perf_counter() - started) * 1e6)
    return summary(taken)

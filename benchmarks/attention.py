"""Attention of gpt-oss on a GPU: whole prompts, chunks of them, and single tokens.

    python benchmarks/attention.py --output attention.json

64 heads of 64 features over 8 key/value heads, bfloat16, with sinks, by position. Contenders are
our kernel, our definition in XLA, and cuDNN's through `jax.nn.dot_product_attention`, which knows
no sinks and computes that much less. A decode step is taken for 24 layers at once, so that no layer
finds its keys in a cache of the GPU; times are those of one. The floor is the larger of two: the
bytes of what is read and written at the measured rate, and the operations on keys that are seen at
that of a matmul. What the kernel gives is compared with float32 arithmetic before it is timed.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import moe_layer_report as reporting
import numpy as np
import timing_jax
from timing import in_turns, reason, sampler, summary
from timing_jax import Repeated

from moe_jax import Tagged, tag
from moe_jax.kernels.attention import EMPTY, attend

HEADS, KV, FEATURES, WINDOW = 64, 8, 64, 128
_LAYERS = 24
_TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call: `queries` tokens of each of `batch` rows, after `start` others.

    With a window, keys are a ring of its size, followed by those of the queries themselves where
    there are several. Without, they lie in `slots`.
    """

    phase: str
    batch: int
    queries: int
    start: int
    slots: int
    window: int | None = None

    @property
    def layers(self) -> int:
        return _LAYERS if self.queries == 1 else 1

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Of queries [q] and keys [k]."""
        end = self.start + self.queries
        own = np.arange(self.start, end)
        if self.window is None:
            slot = np.arange(self.slots)
            return own, np.where(slot < end, slot, EMPTY)
        last = end - 1 if self.queries == 1 else self.start - 1
        held = last - (last - np.arange(self.window)) % self.window
        held = np.where(held < 0, EMPTY, held)
        return own, held if self.queries == 1 else np.concatenate([held, own])

    def pairs(self) -> int:
        """How often a query of a row sees a key."""
        seen = np.arange(self.start, self.start + self.queries) + 1
        return int(np.minimum(seen, self.window or seen.max()).sum())

    def floor_us(self, ceilings: dict[str, float]) -> float:
        end = self.start + self.queries
        first = 0 if self.window is None else max(0, self.start + 1 - self.window)
        elements = 2 * self.queries * HEADS + 2 * (end - first) * KV
        seconds = 2 * self.batch * elements * FEATURES / ceilings["read_TBps"] / 1e12
        operations = 4 * self.batch * self.pairs() * HEADS * FEATURES
        return 1e6 * max(seconds, operations / ceilings["bf16_matmul_TFLOPs"] / 1e12)


def shapes(batches: list[int]) -> list[Shape]:
    """What a model does: layers with a window besides those without."""
    found = []
    for rows, queries, start in ((1, 8192, 0), (1, 2048, 6144), (4, 2048, 6144)):
        found.append(Shape("prefill", rows, queries, start, start + queries))
        found.append(Shape("prefill", rows, queries, start, 0, WINDOW))
    found += [
        Shape("decode", rows, 1, 1040, 1056, window)
        for rows in batches
        for window in (None, WINDOW)
    ]
    return [*found, Shape("decode", 1, 1, 8000, 8192), Shape("decode", 1, 1, 65000, 65536)]


class Problem:
    """Random operands of a shape, for as many layers as it has."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        q_at, k_at = (np.tile(at.astype(np.int32), (shape.batch, 1)) for at in shape.positions())
        self._at = jnp.asarray(q_at), jnp.asarray(k_at)
        keys = jax.random.split(jax.random.key(0), 4)
        kv = (shape.layers, shape.batch, KV, k_at.shape[1], FEATURES)
        self.arrays = (
            jax.random.normal(keys[0], (shape.batch, shape.queries, HEADS, FEATURES), jnp.bfloat16),
            *(jax.random.normal(key, kv, jnp.bfloat16) for key in keys[1:3]),
            jax.random.normal(keys[3], (HEADS,), jnp.bfloat16),
        )

    def ours(self, implementation: str) -> Callable[..., list[jax.Array]]:
        """(q, keys and values of the layers, sinks) -> what comes of each layer."""

        def one(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
            operands = (
                tag(q, "b", "q", "h", "hd"),
                *(tag(x, "b", "kv", "k", "hd") for x in (k, v)),
                tag(sinks, "h"),
                *(tag(at, "b", axis) for at, axis in zip(self._at, "qk", strict=True)),
            )
            out: Tagged = attend(*operands, window=self.shape.window, implementation=implementation)
            return out.array

        return lambda q, k, v, sinks: [one(q, *layer, sinks) for layer in zip(k, v, strict=True)]

    def cudnn(self) -> Callable[..., list[jax.Array]]:
        """The same without sinks, for whole prompts and single tokens.

        Keys lie position by position, as cuDNN is said to like them. A ring's are all seen.
        """
        shape = self.shape
        if shape.queries > 1 and shape.start:
            raise ValueError("cuDNN's causal mask begins at the first key")
        options: dict[str, Any] = {"is_causal": shape.queries > 1}
        if shape.queries > 1 and shape.window is not None:
            options["local_window_size"] = shape.window - 1, 0
        if shape.queries == 1:
            seen = jnp.full(shape.batch, int((self._at[1][0] >= 0).sum()), jnp.int32)
            options["key_value_seq_lengths"] = seen

        def one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)

        return lambda q, k, v, sinks: [one(q, *layer) for layer in zip(k, v, strict=True)]

    def cudnn_arrays(self) -> tuple[jax.Array, ...]:
        q, k, v, sinks = self.arrays
        first = self.shape.window if self.shape.window and self.shape.queries > 1 else 0
        return q, *(jnp.swapaxes(x[:, :, :, first:], 2, 3) for x in (k, v)), sinks

    def error(self, found: jax.Array) -> float:
        """Relative Frobenius error of the first layer against float32."""
        q, k, v, sinks = (x.astype(jnp.float32) for x in self.arrays)
        [expected] = jax.jit(self.ours("xla"))(q, k[:1], v[:1], sinks)
        difference = jnp.linalg.norm((found.astype(jnp.float32) - expected).reshape(-1))
        return float(difference / jnp.linalg.norm(expected.reshape(-1)))


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where the kernel was wrong or did not run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256], help="rows to decode"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--samples", type=int, default=5, help="samples a turn")
    parser.add_argument("--output", type=Path, help="file for the results (JSON)")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": timing_jax.versions(),
        "ceilings": timing_jax.ceilings(),
        "rows": [],
    }
    print(report["device"], report["versions"], report["ceilings"])
    for shape in shapes(options.batch):
        row = measure(shape, report["ceilings"], options.rounds, options.samples)
        report["rows"].append(row)
        print(line(row), flush=True)
        if options.output:
            reporting.write(report, options.output)
    return int(any("ours" not in row["times"] for row in report["rows"]))


def measure(shape: Shape, ceilings: dict[str, float], rounds: int, samples: int) -> dict[str, Any]:
    """The row of a shape."""
    problem, samplers, errors, absent = Problem(shape), {}, {}, {}
    contenders: dict[str, Callable[[], Repeated]] = {
        "ours": lambda: Repeated(problem.ours("triton"), *problem.arrays),
        "xla": lambda: Repeated(problem.ours("xla"), *problem.arrays),
        "cudnn": lambda: Repeated(problem.cudnn(), *problem.cudnn_arrays()),
    }
    for name, make in contenders.items():
        try:
            repeated = make()
            results = repeated.call()
            if name == "ours":
                errors[name] = problem.error(results[0])
                if not errors[name] <= _TOLERANCE:
                    raise ValueError(f"relative error {errors[name]:.1e}")
            samplers[name] = sampler(repeated.run, 1)
        except Exception as error:
            absent[name] = reason(error)
    taken, failed = in_turns(samplers, rounds=rounds, samples=samples)
    times = {name: summary([each / shape.layers for each in us]) for name, us in taken.items()}
    return {
        **dataclasses.asdict(shape),
        "floor_us": shape.floor_us(ceilings),
        "times": times,
        "errors": errors,
        "absent": absent | failed,
    }


def line(row: dict[str, Any]) -> str:
    """A row as text, microseconds."""
    shape = f"{row['phase']} {row['batch']} x {row['queries']} after {row['start']}"
    times = ", ".join(f"{name} {time['us']:.1f}" for name, time in row["times"].items())
    window = f", window {row['window']}" if row["window"] else ""
    return f"{shape}{window}: floor {row['floor_us']:.1f}, {times} {row['errors']} {row['absent']}"


if __name__ == "__main__":
    raise SystemExit(main())

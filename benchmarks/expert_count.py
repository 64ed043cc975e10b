"""Cost of one token against the number of experts, at the same experts_per_token.

    python benchmarks/expert_count.py                    # Linux, on a CPU

The per-token algorithm reads the chosen experts only: time and bytes must not follow the number of
experts. Bytes are not estimated: the packed weights lie in mapped files, and after one call the
kernel is asked which of their pages were touched. Times are medians of interleaved runs.
"""

import argparse
import json
import math
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import BlockScaled, GptOssMLP, mixture_of_experts, tag


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts-per-token", type=int, default=4)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, one token, MXFP4")
    for row in rows:
        print(
            f"{row['experts']:4d} experts: {row['microseconds']:8.1f} us "
            f"({row['ratio']:.2f}x), {row['bytes_read'] / 1e6:.2f} MB of "
            f"{row['bytes_held'] / 1e6:.2f} MB of weights read"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each number of experts; `folder` is for the weights."""
    layers = {count: _layer(count, options, folder) for count in options.experts}
    times: dict[int, list[float]] = {count: [] for count in options.experts}
    for _ in range(options.runs):
        for count, (call, _, _) in layers.items():
            started = time.perf_counter()
            call()
            times[count].append(time.perf_counter() - started)
    first = times[options.experts[0]]
    return [
        {
            "experts": count,
            "microseconds": statistics.median(times[count]) * 1e6,
            "ratio": statistics.median(a / b for a, b in zip(times[count], first, strict=True)),
            "bytes_read": read,
            "bytes_held": held,
        }
        for count, (_, read, held) in layers.items()
    ]


def _layer(
    count: int, options: argparse.Namespace, folder: Path
) -> tuple[Callable[[], object], int, int]:
    """A compiled layer on one token, the bytes of weights one call reads, and those there are."""
    hidden, inner = options.hidden, options.intermediate
    files = []

    def packed(name: str, outputs: int, inputs: int) -> BlockScaled:
        blocks, scales = folder / f"{name}_blocks_{count}", folder / f"{name}_scales_{count}"
        files.extend((blocks, scales))
        return BlockScaled(
            tag(
                _mapped(blocks, (count, outputs, inputs // 32, 16)),
                "expert",
                "out",
                "block",
                "byte",
            ),
            tag(_mapped(scales, (count, outputs, inputs // 32)), "expert", "out", "block"),
        )

    experts = GptOssMLP(
        packed("gate_up", 2 * inner, hidden),
        tag(jnp.zeros((count, 2 * inner)), "expert", "out"),
        packed("down", hidden, inner),
        tag(jnp.zeros((count, hidden)), "expert", "out"),
    )
    x, gating = jnp.ones((1, hidden)), jax.random.normal(jax.random.key(0), (1, count))
    step = jax.jit(
        lambda experts, x, gating: mixture_of_experts(
            experts, x, gating, experts_per_token=options.experts_per_token
        )
    )
    compiled = step.lower(experts, x, gating).compile()
    compiled(experts, x, gating).block_until_ready()
    read = sum(_touched(path) for path in files)
    held = sum(path.stat().st_size for path in files)
    return lambda: compiled(experts, x, gating).block_until_ready(), read, held


def _mapped(path: Path, shape: tuple[int, ...]) -> jax.Array:
    """A uint8 array of zeros that is a mapped file, not a copy of it."""
    with path.open("wb") as file:
        file.truncate(math.prod(shape))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    host = np.frombuffer(memory, np.uint8).reshape(shape)
    array = jax.device_put(host)
    if array.unsafe_buffer_pointer() != host.ctypes.data:
        raise RuntimeError("JAX copied the weights, so their pages tell nothing")
    return array


def _touched(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()[0]
        if "-" in field and not field.endswith(":"):
            here = line.endswith(str(path))
        elif here and field == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    main()

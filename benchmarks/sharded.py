"""gpt-oss with random weights on meshes of 1, 2 and 4 devices, collectives, and one layer alone.

    python benchmarks/sharded.py --output sharded.json                 # all of it
    python benchmarks/sharded.py --output sharded.json --parts parts   # collectives and layers only
    python benchmarks/sharded.py --output sharded.json --parts model --mesh data=1 model=4
    python benchmarks/sharded.py --model tiny --cpu-devices 8          # a try, on a CPU

Tokens per second of decoding and of prefill, each with its floor, its spread, and whether results
are those of one device. Every row is written at once, and `--output` keeps the rows of earlier
runs, so that a run may be cut and the rest made up for. `--mesh data=1` must come first: the others
are held to its results, which lie beside the report in a file .npz.

Floors are explained in sharded_floors.py, what is held to one device in sharded_measure.py.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import sharded_model
import sharded_parts
import sharded_profile
import sharded_report
import timing_jax
from sharded_floors import Rates
from sharded_measure import Measurement, Plan, Reference
from sharded_model import MeshModel, Prompts
from timing import gpu_state, reason

from gpt_oss.chunks import prefill_chunks
from gpt_oss.config import GptOssConfig
from gpt_oss.mesh import describe, fault
from moe_jax.kernels.lowering import has_kernels

AXES: tuple[str, ...] = ("data", "expert", "model")
PARTS = ("parts", "model")

_IDENTITY = ("mesh", "phase", "batch", "tokens", "rows", "context", "communication", "collective")
_TINY: dict[str, Any] = {
    "batch": [1, 8],
    "prefill": ["4x32"],
    "chunk": 16,
    "reaches": 1,
    "context": 24,
    "steps": 8,
    "sizes": [1, 64],
    "ceiling_bytes": 1 << 22,
    "ceiling_matmul": 256,
    "samples": 2,
    "sample_s": 0.02,
    "dtype": "float32",
    "tolerance": 1e-4,
}


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where results differ from those of one device, or a row could not be measured."""
    options = _options(arguments)
    bench = Bench(options)
    bench.run()
    print(sharded_report.table(bench.report["rows"]), flush=True)
    wrong = [row for row in bench.measured if row.get("same") is False or "absent" in row]
    return int(bool(wrong))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=sharded_model.MODELS, default="20b")
    add("--devices", type=int, nargs="+", default=[1, 2, 4], help="meshes of so many devices")
    add("--mesh", nargs="+", type=_mesh, help="these instead, as expert=2,model=2")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--batch", type=int, nargs="*", default=[1, 8, 32, 128, 256], help="rows to decode")
    add("--prefill", nargs="*", default=["1x8192", "4x8192"], help="prompts, as ROWSxTOKENS")
    add("--chunk", type=int, help="tokens of a row at a time; else as the engine takes them")
    add(
        "--reaches",
        type=int,
        default=1,
        help="programs of a prompt; without kernels, fewer compute more",
    )
    add("--context", type=int, default=1024, help="tokens before those that are decoded")
    add("--steps", type=int, default=32, help="tokens that one call decodes")
    add("--sizes", type=int, nargs="+", default=[1, 8, 32, 128, 512, 2048, 8192, 32768])
    add("--samples", type=int, default=7)
    add("--sample-s", type=float, default=0.4, help="seconds for a row of a part")
    add("--row-s", type=float, default=8.0, help="begin no call after so many seconds of a row")
    add("--budget-s", type=float, default=540.0, help="begin no row after so many seconds")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--tolerance", type=float, default=0.1, help="largest relative error of logits")
    add("--ceiling-bytes", type=int, default=1 << 32, help="array to measure the memory with")
    add("--ceiling-matmul", type=int, default=8192, help="matmul to measure the arithmetic with")
    add("--threads", type=int, default=os.cpu_count() or 1, help="programs to compile at a time")
    add("--compilation-cache", type=Path, help="folder in which compiled programs are kept")
    add("--cpu-devices", type=int, help="take the CPU as so many devices")
    add("--output", type=Path, help="file for the results (JSON); rows in it are kept")
    add("--profile", type=Path, help="folder for traces of a decode step and a prefill a mesh")
    if parser.parse_args(arguments).model == "tiny":
        parser.set_defaults(**_TINY)
    return parser.parse_args(arguments)


def _mesh(text: str) -> dict[str, int]:
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"expected expert=2,model=2 or the like, got {text!r}")
        sizes[axis] = int(size)
    return sizes


def default_meshes(config: GptOssConfig, counts: Iterable[int]) -> Iterator[dict[str, int]]:
    """For each count: all devices on one axis, and half of them on `model`, where that fits."""
    for count in counts:
        shapes = [(1, 1, count), (1, count, 1), (count, 1, 1)]
        if count > 2 and count % 2 == 0:
            shapes.insert(1, (1, 2, count // 2))
        seen = set()
        for shape in shapes:
            sizes = dict(zip(AXES, shape, strict=True))
            if shape not in seen and fault(config, sizes) is None:
                yield sizes
            seen.add(shape)


class Bench:
    """The report, and what is measured for it, row by row.

    Attributes:
        report: device, model, versions, ceilings and rows, those of earlier runs among them.
        measured: the rows of this run.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Reads an earlier report, if there is one.

        Raises:
            ValueError: it is of another device or model.
        """
        self._start = time.monotonic()
        self._options = options
        if options.cpu_devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", options.cpu_devices)
        if options.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", str(options.compilation_cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        self._config = sharded_model.model_config(options.model)
        self._dtype = jnp.dtype(options.dtype)
        self._compile_seconds = 0.0
        self.measured: list[dict[str, Any]] = []
        self.report = self._begin()
        self._reference = Reference(options.output and options.output.with_suffix(".npz"))

    def _begin(self) -> dict[str, Any]:
        options = self._options
        report: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "model": options.model,
            "dtype": options.dtype,
            "versions": timing_jax.versions(),
            "gpu": gpu_state(),
            "ceilings": {},
            "rows": [],
        }
        if options.output and options.output.exists():
            earlier = json.loads(options.output.read_text())
            for key in ("device", "model", "dtype"):
                if earlier[key] != report[key]:
                    raise ValueError(
                        f"{options.output} has results for {key} {earlier[key]!r}, this run is for "
                        f"{report[key]!r}: give another --output"
                    )
            report["ceilings"], report["rows"] = earlier["ceilings"], earlier["rows"]
        if not report["ceilings"]:
            report["ceilings"] = timing_jax.ceilings(options.ceiling_bytes, options.ceiling_matmul)
        return report

    def run(self) -> None:
        """Measures all that is asked for while there is time."""
        print(*(self.report[key] for key in ("device", "versions", "ceilings")), sep="\n")
        counts = [n for n in self._options.devices if n <= len(jax.devices())]
        if "parts" in self._options.parts:
            for count in counts:
                self._take(self._parts(count), f"parts on {count} devices")
            for count in counts:
                self._print_start_rows(count)
        if "model" in self._options.parts:
            meshes = self._options.mesh or list(default_meshes(self._config, counts))
            for sizes in meshes:
                self._take(self._mesh(sizes), describe(sizes), self._compile_seconds)
                gc.collect()  # the next model needs the memory

    def _parts(self, count: int) -> Iterator[dict[str, Any]]:
        options = self._options
        how = {"threads": options.threads, "seconds": options.sample_s}
        if count > 1:
            width = self._config.hidden_size
            yield from sharded_parts.collectives(count, options.sizes, width, self._dtype, **how)
        yield from sharded_parts.layers(self._config, count, options.sizes, self._dtype, **how)

    def _mesh(self, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
        """A row for the weights, and those of `Measurement`."""
        options = self._options
        model = MeshModel(self._config, sizes, self._dtype)
        yield _weights_row(model, sizes)
        measurement = Measurement(model, self._plan(), self._reference)
        self._compile_seconds = max(self._compile_seconds, measurement.compile_seconds)
        print(f"{describe(sizes)}: compiled in {measurement.compile_seconds:.1f} s", flush=True)
        rates = Rates(self.report["rows"])
        yield from measurement.rows(sizes, self.report["ceilings"], rates)
        if options.profile:
            for what, times in measurement.profile(options.profile / describe(sizes)):
                print(sharded_profile.table(f"{describe(sizes)}, {what}", times), flush=True)
                devices = [dataclasses.asdict(t) | {"idle": t.idle} for t in times]
                yield {"mesh": sizes, "phase": f"profile {what}", "device_times": devices}

    def _plan(self) -> Plan:
        options = self._options
        return Plan(
            batches=tuple(options.batch),
            context=options.context,
            steps=options.steps,
            prompts=tuple(_prompts(text, options) for text in options.prefill),
            samples=options.samples,
            row_seconds=options.row_s,
            tolerance=options.tolerance,
            threads=options.threads,
        )

    def _take(self, rows: Iterator[dict[str, Any]], what: str, at_first: float = 0.0) -> None:
        """Adds rows to the report while there is time; what fails as a whole is a row, too.

        `at_first` is how many seconds the first row takes at least.
        """
        while True:
            spent = time.monotonic() - self._start
            if spent + at_first > self._options.budget_s:
                print(f"{what}: the rest is left out, {spent:.0f} s are spent (--budget-s)")
                return
            at_first = 0.0
            try:
                row = next(rows, None)
            except Exception as error:
                row = {"mesh": what, "phase": "failed", "absent": reason(error)}
            if row is None:
                return
            self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self.measured.append(row)
        same = {key: row.get(key) for key in _IDENTITY}
        kept = [r for r in self.report["rows"] if {k: r.get(k) for k in _IDENTITY} != same]
        self.report["rows"] = [*kept, row]
        sharded_report.add_speedups(self.report["rows"])
        print(sharded_report.line(row), flush=True)
        if self._options.output:
            self._options.output.write_text(json.dumps(self.report, indent=1) + "\n")

    def _print_start_rows(self, count: int) -> None:
        if count == 1:
            return
        chosen = self._config.experts_per_token
        low, high = sharded_parts.start_rows(self.report["rows"], count, chosen)
        print(f"{count} devices: starting an exchange costs {low:.0f} to {high:.0f} rows")


def _prompts(text: str, options: argparse.Namespace) -> Prompts:
    rows, length = map(int, text.split("x"))
    kernels = has_kernels(jax.devices()) and options.dtype == "bfloat16"
    chunk = min(options.chunk or prefill_chunks(rows, kernels)[-1], length)
    if length % chunk:
        raise ValueError(f"--prefill {text}: {length} tokens are no multiple of --chunk {chunk}")
    steps = max(1, min(options.reaches, length // chunk))
    reaches = (-(-length * n // steps // chunk) * chunk for n in range(1, steps + 1))
    return Prompts(rows, length, chunk, tuple(sorted(set(reaches))))


def _weights_row(model: MeshModel, sizes: dict[str, int]) -> dict[str, Any]:
    """What each device holds, and whether it is an equal share of the experts."""
    experts = [block.mlp.experts for block in model.model.layers]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    held = sharded_model.bytes_per_device(experts)
    owners = sizes["expert"] * sizes["model"]
    return {
        "mesh": sizes,
        "devices": math.prod(sizes.values()),
        "phase": "weights",
        "us": model.weight_seconds * 1e6,
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.model)),
        "bytes_per_device": sharded_model.bytes_per_device(model.model),
        "expert_bytes": total,
        "expert_bytes_per_device": held,
        "same": all(owners * one == total for one in held),
    }


if __name__ == "__main__":
    sys.exit(main())

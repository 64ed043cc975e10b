"""The grouped matmul on bfloat16 weights: forward and both gradients, against its peers.

    python benchmarks/grouped_matmul.py --output grouped_matmul.json

The matmuls of one gpt-oss-20b layer on 8192 tokens of 4 experts each. Peers are `lax.ragged_dot`
and, in a process of its own, torch's `grouped_mm` (`pip install torch`; `--peer-python` names
another interpreter, `--peer-path` its PYTHONPATH). A peer that is missing is reported as absent.
Every pass of ours is compared with float32 products before it is timed.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# two processes share the device
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import moe_layer_report as reporting
import numpy as np
import timing_jax
from jax import lax
from peer_process import PeerError, PeerProcess
from timing import Sampler, in_turns, reason, sampler, summary
from timing_jax import Repeated

from moe_jax import tag
from moe_jax.kernels.grouped_matmul import grouped_matmul

PASSES = ("forward", "rows_gradient", "weight_gradient")
_SCRIPT = Path(__file__).with_name("grouped_matmul_torch.py")
_TOLERANCE = 3e-3

type Matmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where ours was wrong or did not run."""
    options = _parser().parse_args(arguments)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": timing_jax.versions(),
        "rows": [],
    }
    for outputs in options.out:
        report["rows"] += measure(options, outputs, report["versions"])
        if options.output:
            reporting.write(report, options.output)
    print(report["device"], report["versions"])
    print(table(report["rows"]), flush=True)
    return int(any("ours" not in row["tflops"] for row in report["rows"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=8192 * 4)
    add("--experts", type=int, default=32)
    add("--in", type=int, default=2880, dest="inputs")
    add("--out", type=int, nargs="+", default=[5760, 2880])
    add("--rounds", type=int, default=3, help="turns of each contender")
    add("--samples", type=int, default=5, help="samples a turn")
    add("--peer-python", default=sys.executable, help="interpreter of torch")
    add("--peer-path", help="its PYTHONPATH")
    add("--output", type=Path, help="file for the results (JSON)")
    return parser


def measure(options: argparse.Namespace, outputs: int, versions: dict[str, str]) -> list[dict]:
    """A row for each pass at one shape; adds torch's version to `versions`."""
    rng = np.random.default_rng(0)
    sizes = np.bincount(rng.integers(options.experts, size=options.rows), minlength=options.experts)
    peer, names, lost = _start_torch(options, sizes, outputs, versions)
    problem = Problem(sizes.astype(np.int32), options.inputs, outputs)
    rows = []
    for name in PASSES:
        errors, absent, samplers = {}, {"grouped_mm": lost} if lost else {}, {}
        for contender, matmul in (("ours", _ours), ("ragged_dot", _ragged_dot)):
            try:
                repeated = Repeated(problem.function(name, matmul), *problem.arrays)
                errors[contender] = problem.error(name, repeated.call())
                if contender == "ours" and not errors[contender] <= _TOLERANCE:
                    raise ValueError(f"relative error {errors[contender]:.1e}")
                samplers[contender] = sampler(repeated.run, 1)
            except Exception as error:
                absent[contender] = reason(error)
        if peer is not None and name in names:
            samplers["grouped_mm"] = _remote(peer, name)
        taken, failed = in_turns(samplers, rounds=options.rounds, samples=options.samples)
        times = {contender: summary(us) for contender, us in taken.items()}
        flops = 2 * options.rows * options.inputs * outputs
        rows.append(
            {
                "pass": name,
                "rows": options.rows,
                "experts": options.experts,
                "in": options.inputs,
                "out": outputs,
                "tflops": {c: flops / time["us"] / 1e6 for c, time in times.items()},
                "times": times,
                "errors": errors,
                "absent": absent | failed,
            }
        )
        print(table(rows[-1:]), flush=True)
    if peer is not None:
        peer.close()
    return rows


def _start_torch(
    options: argparse.Namespace, sizes: np.ndarray, outputs: int, versions: dict[str, str]
) -> tuple[PeerProcess | None, list[str], str | None]:
    """The process, the passes it can run, and why there is none."""
    try:
        peer = PeerProcess(_SCRIPT, options.peer_python, options.peer_path)
    except PeerError as error:
        return None, [], str(error)
    try:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        answer = peer.ask(
            "prepare", sizes=sizes.tolist(), inputs=options.inputs, outputs=outputs, device=device
        )
    except PeerError as error:
        peer.close()
        return None, [], str(error)
    versions["torch"] = answer["version"]
    return peer, answer["passes"], None


def _remote(peer: PeerProcess, name: str) -> Sampler:
    return lambda samples: peer.ask("sample", name=name, samples=samples)


class Problem:
    """Random rows, weights and a gradient of the result.

    Attributes:
        arrays: rows {row, in}, weight {expert, out, in}, group sizes {expert}, and the gradient of
            the result {row, out}; bfloat16 but for the int32 sizes.
    """

    def __init__(self, sizes: np.ndarray, inputs: int, outputs: int) -> None:
        keys = jax.random.split(jax.random.key(0), 3)
        count = int(sizes.sum())

        def normal(key: jax.Array, *shape: int) -> jax.Array:
            return jax.random.normal(key, shape, jnp.bfloat16)

        self.arrays = (
            normal(keys[0], count, inputs),
            normal(keys[1], len(sizes), outputs, inputs) * inputs**-0.5,
            jnp.asarray(sizes),
            normal(keys[2], count, outputs),
        )

    def function(self, name: str, matmul: Matmul) -> Callable[..., jax.Array]:
        """A pass as a function of `arrays`."""

        def gradients(x: jax.Array, weight: jax.Array, sizes: jax.Array, gradient: jax.Array):
            return jax.vjp(lambda x, weight: matmul(x, weight, sizes), x, weight)[1](gradient)

        return {
            "forward": lambda x, weight, sizes, gradient: matmul(x, weight, sizes),
            "rows_gradient": lambda *arrays: gradients(*arrays)[0],
            "weight_gradient": lambda *arrays: gradients(*arrays)[1],
        }[name]

    def error(self, name: str, result: jax.Array) -> float:
        """Relative Frobenius error against float32 products at full precision."""
        x, weight, sizes, gradient = self.arrays
        expected = _expected(name, x, weight, sizes, gradient)
        difference = jnp.linalg.norm((result.astype(jnp.float32) - expected).reshape(-1))
        return float(difference / jnp.linalg.norm(expected.reshape(-1)))


@functools.partial(jax.jit, static_argnums=0)
def _expected(
    name: str, x: jax.Array, weight: jax.Array, sizes: jax.Array, gradient: jax.Array
) -> jax.Array:
    """A pass by multiplying all rows with every expert and keeping each row's own."""
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))[:, None]
    shape = {"forward": gradient.shape, "rows_gradient": x.shape, "weight_gradient": weight.shape}

    def step(e: jax.Array, total: jax.Array) -> jax.Array:
        if name == "forward":
            return jnp.where(owner == e, _dot(x, weight[e].T), total)
        if name == "rows_gradient":
            return jnp.where(owner == e, _dot(gradient, weight[e]), total)
        own = jnp.where(owner == e, gradient, jnp.zeros_like(gradient))
        return total.at[e].set(_dot(own.T, x))

    return lax.fori_loop(0, len(sizes), step, jnp.zeros(shape[name], jnp.float32))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _ours(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    y = grouped_matmul(
        tag(x, "row", "in"), tag(weight, "expert", "out", "in"), tag(sizes, "expert")
    )
    return y.untag("row", "out")


def _ragged_dot(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, weight.transpose(0, 2, 1), sizes)


def table(rows: list[dict]) -> str:
    """TFLOP/s of each pass and contender."""
    lines = []
    for row in rows:
        figures = ", ".join(f"{name} {value:.0f}" for name, value in row["tflops"].items())
        absent = "".join(f"; absent: {name}: {why}" for name, why in row["absent"].items())
        error = row["errors"].get("ours", float("nan"))
        lines.append(
            f"{row['rows']} x {row['in']} -> {row['out']} {row['pass']:15}: {figures} TFLOP/s; "
            f"error {error:.1e}{absent}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""One MoE layer of gpt-oss, router logits to combined output: ours, its peers, and the floor.

    python benchmarks/moe_layer.py --output moe_layer.json --plot moe_layer.png
    python benchmarks/moe_layer.py --experts 128 --tokens 1 2 4 8 16 32 64 128
    python benchmarks/moe_layer.py --routing zipf

bfloat16 activations, MXFP4 weights. It needs this package with its `cuda13` (or `cuda12`) extra.
What is not installed is reported as absent, and so is a plot without matplotlib:

    pip install torch tokenspeed-triton-kernels matplotlib

Peers in torch have a process of their own, so they may live in an environment of their own:
`--peer-python /path/to/python`, or `--peer-path FOLDER` for its PYTHONPATH. Given several times,
`--peer-path` runs triton_kernels once in each, for example with different versions of Triton.

    triton_kernels  OpenAI's layer on the same weights, rows and logits: the better of its two
                    layouts, from 2048 tokens on also with three stages
    grouped_mm      torch, bfloat16 weights: the two matmuls alone
    ragged_dot      `lax.ragged_dot`, bfloat16 weights: the two matmuls alone
    naive           decode the weights, then `jnp.einsum`; a whole layer

Contenders are checked before they are timed: against float64, on the weights as they are stored,
with outputs that held NaN before. Weight sets take turns, so that the cache is of no help. The
floor is the bytes of the chosen experts, or the operations, at what the device reached in this run.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

# two processes share the device
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import moe_layer_problem as problem
import moe_layer_report as reporting
import numpy as np
import timing_jax
from moe_layer_jax import Ours, gpt_oss_experts, prepared
from moe_layer_peers import IN_JAX, IN_TORCH, NAMES, JaxPeers, TorchPeers, Variant
from moe_layer_problem import Packed, Shape, Weights
from moe_layer_reference import reference, relative_error
from timing import gpu_state, in_turns, reason, sampler, summary
from timing_jax import Repeated

_PEER_TOLERANCE = 1.5e-2
_CHECKED_LAYERS = 2


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where ours was wrong, differed from call to call, or did not run."""
    options = _parser().parse_args(arguments)
    bench = Bench(options)
    try:
        report = bench.run()
    finally:
        bench.close()
    if options.plot and (why := reporting.plot(report, options.plot)):
        print(why)
    print(reporting.table(report), flush=True)
    return int(any(not row.get("same_bits", False) for row in report["rows"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    counts = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192]
    add("--tokens", type=int, nargs="+", default=counts)
    add("--hidden", type=int, default=2880)
    add("--intermediate", type=int, default=2880)
    add("--experts", type=int, default=32, help="32: gpt-oss-20b, 128: gpt-oss-120b")
    add("--experts-per-token", type=int, default=4)
    add("--routing", choices=problem.ROUTINGS, default="uniform")
    add("--sets", type=int, default=8, help="weight sets that take turns; 2 from 2048 tokens on")
    add("--rounds", type=int, default=3, help="turns of each contender")
    add("--samples", type=int, default=7, help="samples a turn")
    add("--sample-ms", type=float, default=40.0, help="least duration of a sample")
    add("--tolerance", type=float, default=3e-3, help="largest relative error of ours")
    add("--peers", nargs="*", choices=NAMES, default=list(NAMES))
    add("--peer-python", default=sys.executable, help="interpreter of the peers in torch")
    add("--peer-path", action="append", help="PYTHONPATH of the peers in torch")
    add("--budget-s", type=float, default=450.0, help="start no row after so many seconds")
    add("--ceiling-bytes", type=int, default=1 << 32, help="array to measure the memory with")
    add("--ceiling-matmul", type=int, default=8192, help="matmul to measure the arithmetic with")
    add("--output", type=Path, help="file for the results (JSON)")
    add("--plot", type=Path, help="file for a plot: .png, .svg, .pdf")
    return parser


class Bench:
    """The contenders, and the measurement of one row after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._start = time.monotonic()
        self._options = options
        self._shape = Shape(
            options.hidden, options.intermediate, options.experts, options.experts_per_token
        )
        self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._torch_peers = self._start_torch_peers()
        try:
            self._make_experts()
            several = len(self._torch_peers) > 1
            for number, peers in enumerate(self._torch_peers):
                peers.started(number if several else None)
        except BaseException:
            self.close()
            raise

    def _start_torch_peers(self) -> list[TorchPeers]:
        options = self._options
        names = [name for name in IN_TORCH if name in options.peers]
        found = []
        for path in options.peer_path or [None]:
            if not names:
                break
            peers = TorchPeers(names, options.peer_python, path)
            peers.send(
                "start",
                shape=vars(self._shape),
                sets=options.sets,
                device=self._device,
                contenders=names,
            )
            found.append(peers)
            names = [name for name in names if name == "triton_kernels"]
        return found

    def _make_experts(self) -> None:
        """Our weights, and those of the layers that are checked as they were before."""
        self._checked: list[Weights] = []
        experts, plain = [], []
        for i in range(self._options.sets):
            layer = problem.weights(self._shape, i)
            one = gpt_oss_experts(layer)
            experts.append(prepared(one))
            if i < _CHECKED_LAYERS:
                plain.append(one)
                self._checked.append(_on_device(layer, one))
        self._ours = Ours(self._shape, experts)
        names = [name for name in IN_JAX if name in self._options.peers]
        self._jax_peers = JaxPeers(names, self._shape, plain)

    def run(self) -> dict:
        """The report; it is written after every row."""
        report = {
            "device": jax.devices()[0].device_kind,
            "versions": self._versions(),
            "ceilings": self._ceilings(),
            "rows": [],
        }
        print(report["device"], report["versions"], gpu_state(), report["ceilings"], sep="\n")
        for peers in self._torch_peers:
            for name, why in peers.absent.items():
                print(f"absent: {name}: {why}")
        for tokens in self._options.tokens:
            spent = time.monotonic() - self._start
            if spent > self._options.budget_s:
                print(f"{tokens} tokens: left out, {spent:.0f} s are spent (--budget-s)")
                continue
            report["rows"].append(self._row(tokens, report["ceilings"]))
            if self._options.output:
                reporting.write(report, self._options.output)
        return report

    def _versions(self) -> dict[str, str]:
        found = timing_jax.versions()
        for i, peers in enumerate(self._torch_peers):
            found |= {f"peer {i} {name}": version for name, version in peers.versions.items()}
        return found

    def _ceilings(self) -> dict:
        num_bytes, size = self._options.ceiling_bytes, self._options.ceiling_matmul
        measured = {"jax": timing_jax.ceilings(num_bytes, size)}
        for peers in self._torch_peers[:1]:
            if (found := peers.ceilings(num_bytes, size, self._device)) is not None:
                measured["torch"] = found
        best = {name: max(m[name] for m in measured.values()) for name in measured["jax"]}
        return {**best, "measured": measured}

    def _row(self, tokens: int, ceilings: dict) -> dict:
        options, shape = self._options, self._shape
        began = time.monotonic()
        sample = options.sample_ms / 1e3
        for peers in self._torch_peers:
            peers.send("prepare", tokens=tokens, routing=options.routing)
        expected = self._expected(0, tokens, problem.rows(shape, tokens))
        ours, error, absent = self._prepare_ours(tokens, expected)
        answers = [peers.prepared(sample) for peers in self._torch_peers]
        answers.append(self._jax_peers.prepared(tokens, options.routing, sample))
        variants: dict[str, Variant] = {}
        for found, why in answers:
            variants |= found
            absent |= why
        errors, wrong = _peer_errors(variants, expected)
        samplers = {name: v.sampler for name, v in variants.items() if name not in wrong}
        if ours is not None:
            samplers = {"ours": sampler(ours.run, len(ours.results), sample=sample), **samplers}
        taken, failed = in_turns(samplers, rounds=options.rounds, samples=options.samples)
        times = {name: summary(us) for name, us in taken.items()}
        row = self._summarize(tokens, times, variants, ceilings)
        row |= {"error": error, "peer_errors": errors, "absent": absent | wrong | failed}
        if ours is not None:
            row["host_us"] = ours.host_seconds / len(ours.results) * 1e6
            row["same_bits"] = _same_bits(ours)
        row |= {"gpu": gpu_state(), "seconds": time.monotonic() - began}
        _print_row(row)
        return row

    def _prepare_ours(
        self, tokens: int, expected: np.ndarray
    ) -> tuple[Repeated | None, float | None, dict[str, str]]:
        """Ours, compiled and found right, or None; its error; and the reason where it is None."""
        try:
            ours = self._ours.prepare(tokens, self._options.routing)
            error = self._error(tokens, ours.call(), expected)
        except Exception as failure:
            traceback.print_exc()
            return None, None, {"ours": reason(failure)}
        if error <= self._options.tolerance:
            return ours, error, {}
        why = f"relative error {error:.1e}, above {self._options.tolerance:.1e}"
        return None, error, {"ours": why}

    def _summarize(
        self, tokens: int, times: dict, variants: dict[str, Variant], ceilings: dict
    ) -> dict:
        shape, options = self._shape, self._options
        sets = problem.sets_in_use(tokens, options.sets)
        turns = sets * problem.rotations(tokens)
        distinct = problem.count_distinct(shape, tokens, turns, options.routing)
        ours = times.pop("ours", None)
        peers_us: dict[str, float] = {}
        for name, time_ in times.items():
            peer = variants[name].peer
            peers_us[peer] = min(time_["us"], peers_us.get(peer, float("inf")))
        return {
            "tokens": tokens,
            "ours_us": ours and ours["us"],
            "peers_us": peers_us,
            "floor_us": problem.floor_us(
                shape,
                tokens,
                distinct,
                terabytes=max(ceilings["read_TBps"], ceilings["copy_TBps"]),
                teraflops=ceilings["bf16_matmul_TFLOPs"],
            ),
            **({"p10": ours["p10"], "p90": ours["p90"]} if ours else {}),
            "distinct_experts": distinct,
            "routing": options.routing,
            "shape": vars(shape),
            "sets": sets,
            "peer_variants": times,
        }

    def _expected(self, layer: int, tokens: int, x: np.ndarray) -> np.ndarray:
        logits = problem.logits(self._shape, tokens, layer, self._options.routing)
        return reference(self._shape, self._checked[layer], x, logits)

    def _error(self, tokens: int, results: list[jax.Array], expected: np.ndarray) -> float:
        """The largest relative error of the layers that are checked, NaN where one is NaN."""
        rows = [np.asarray(y.astype(jnp.float32)) for y in results[: len(self._checked)]]
        errors = [relative_error(rows[0], expected)]
        for layer in range(1, len(rows)):
            # each layer is judged by the rows that it was given
            errors.append(
                relative_error(rows[layer], self._expected(layer, tokens, rows[layer - 1]))
            )
        return float(np.max(errors))

    def close(self) -> None:
        """Ends the peers' processes."""
        for peers in self._torch_peers:
            peers.close()


def _same_bits(repeated: Repeated) -> bool:
    """Whether two calls return the same, bit for bit."""
    first = [np.asarray(y).tobytes() for y in repeated.call()]
    return first == [np.asarray(y).tobytes() for y in repeated.call()]


def _on_device(layer: Weights, experts) -> Weights:
    """The weights with the arrays of `experts` in the place of NumPy's."""
    return Weights(
        Packed(experts.gate_up.blocks.array, experts.gate_up.scales.array),
        layer.gate_up_bias,
        Packed(experts.down.blocks.array, experts.down.scales.array),
        layer.down_bias,
    )


def _peer_errors(
    variants: dict[str, Variant], expected: np.ndarray
) -> tuple[dict[str, float], dict[str, str]]:
    """Relative errors by name, and the reason by name for those that are wrong."""
    errors = {
        name: relative_error(variant.output, expected)
        for name, variant in variants.items()
        if variant.output is not None
    }
    wrong = {
        name: f"relative error {error:.1e}, above {_PEER_TOLERANCE:.1e}"
        for name, error in errors.items()
        if not error <= _PEER_TOLERANCE
    }
    return errors, wrong


def _print_row(row: dict) -> None:
    ours = "absent" if row["ours_us"] is None else f"{row['ours_us']:.1f}"
    peers = ", ".join(f"{name} {us:.1f}" for name, us in row["peers_us"].items())
    print(
        f"{row['tokens']} tokens: ours {ours} us, {peers} us; floor {row['floor_us']:.1f} us; "
        f"error {row['error']}; {row['seconds']:.0f} s"
        + ("" if row.get("same_bits", True) else "; ours DIFFERS from call to call"),
        flush=True,
    )
    for name, why in row["absent"].items():
        print(f"  absent: {name}: {why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

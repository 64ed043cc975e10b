"""Bits per byte of gpt-oss-nano on held-out text, by how its experts are dispatched.

    (cd examples && python -m gpt_oss.nano.prepare --out data)      # once
    python benchmarks/nano_quality.py --data examples/data

With a fixed budget every expert takes at most ratio x (its mean share) of the tokens of a batch of
windows; the table says what that costs in quality, and how many (token, expert) pairs were
re-routed to another expert or dropped.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss.config import GptOssConfig
from gpt_oss.evaluate import bits_per_byte
from gpt_oss.loader import read_parameters
from gpt_oss.model import GptOss
from gpt_oss.source import CHECKPOINTS
from moe_jax import tag
from moe_jax.checkpoint import Checkpoint

RATIOS = (1.0, 1.5, 2.0, 4.0)
LENGTH, STRIDE, BATCH = 512, 256, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of gpt_oss.nano.prepare")
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "gpt-oss-nano")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    tokens = np.load(options.data / "heldout.npy").astype(np.int32)
    num_bytes = (options.data / "heldout.txt").stat().st_size
    config = GptOssConfig.from_folder(options.model)
    parameters = read_parameters(Checkpoint.open(options.model), config, dtype=jnp.float32)
    rows = []
    print(f"{'dispatch':30} {'bits/byte':>9} {'re-routed':>9} {'dropped':>9}")
    for name, settings in _variants():
        model = GptOss(config, parameters.__getitem__, dtype=jnp.float32, **settings)
        bits = bits_per_byte(model, tokens, num_bytes, length=LENGTH, stride=STRIDE, batch=BATCH)
        rerouted, dropped = _shares(model, tokens)
        rows.append(
            {"dispatch": name, "bits_per_byte": bits, "rerouted": rerouted, "dropped": dropped}
        )
        print(f"{name:30} {bits:9.4f} {rerouted:9.2%} {dropped:9.2%}", flush=True)
    if options.json:
        device = jax.devices()[0].device_kind
        report = {"device": device, "jax": jax.__version__, "bytes": num_bytes, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _variants() -> Iterator[tuple[str, dict]]:
    for algorithm in ("grouped", "dense"):
        yield algorithm, {"algorithm": algorithm}
    for overflow in ("reroute", "drop"):
        for ratio in RATIOS:
            settings = {"algorithm": "fixed_budget", "tokens_per_expert_ratio": ratio}
            yield f"fixed_budget {ratio} {overflow}", {**settings, "overflow": overflow}


def _shares(model: GptOss, tokens: np.ndarray) -> tuple[float, float]:
    """Shares of the chosen pairs that were re-routed and that were dropped for good."""

    @jax.jit
    def counts(model: GptOss, window: jax.Array) -> jax.Array:
        reports = [s.report for s in model.with_statistics(tag(window, "b", "s"))[1]]
        return jnp.stack([jnp.stack([r.assigned, r.rerouted, r.dropped]) for r in reports]).sum(0)

    total = np.zeros(3)
    for start in range(0, len(tokens) - BATCH * LENGTH, BATCH * LENGTH):
        window = tokens[start : start + BATCH * LENGTH].reshape(BATCH, LENGTH)
        total += np.asarray(counts(model, jnp.asarray(window)))
    assigned, rerouted, dropped = total
    # a re-routed pair is also one that its first expert dropped
    wanted = assigned - rerouted + dropped
    return rerouted / wanted, (dropped - rerouted) / wanted


if __name__ == "__main__":
    main()

"""Bits per byte of gpt-oss-nano on held-out text, by how its experts are dispatched.

    (cd examples && python -m gpt_oss.nano.prepare --out data)      # once
    python benchmarks/nano_quality.py --data examples/data

With a fixed budget every expert takes at most ratio x (its mean share) of the tokens of a batch of
windows; the table says what that costs in quality, and how many (token, expert) pairs were
re-routed to another expert or dropped.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss.evaluate import evaluate
from gpt_oss.loader import load_model
from gpt_oss.source import CHECKPOINTS

RATIOS = (1.0, 1.5, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of gpt_oss.nano.prepare")
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "gpt-oss-nano")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    tokens = np.load(options.data / "heldout.npy").astype(np.int32)
    num_bytes = (options.data / "heldout.txt").stat().st_size
    rows = []
    print(f"{'dispatch':30} {'bits/byte':>9} {'re-routed':>9} {'dropped':>9}")
    for name, settings in _variants():
        model = load_model(options.model, dtype=jnp.float32, progress=False, **settings)
        found = evaluate(model, tokens, num_bytes)
        rows.append({"dispatch": name, **dataclasses.asdict(found)})
        print(
            f"{name:30} {found.bits_per_byte:9.4f} {found.rerouted:9.2%} {found.dropped:9.2%}",
            flush=True,
        )
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


if __name__ == "__main__":
    main()

"""Tokens per second of generation: a checkpoint, or random weights of a given shape.

    python benchmarks/decode_speed.py                                # the shipped nano
    python benchmarks/decode_speed.py --config config.json --batch 1 8 32

Each figure is the median of several runs after one that compiles. Greedy, random prompts, no stop.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss.config import GptOssConfig
from gpt_oss.engine import Engine
from gpt_oss.generation import Request
from gpt_oss.initialization import random_parameters
from gpt_oss.layout import parameter_specs
from gpt_oss.model import GptOss
from gpt_oss.pretrained import load
from moe_jax import BlockScaled, Tagged, TiledMXFP4, quantize_mxfp4
from moe_jax.experts.prepare import prepare_for_devices


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gpt-oss-nano", help="as for generate.py")
    parser.add_argument("--config", type=Path, help="config.json: random weights of this shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = _random(options.config) if options.config else load(options.model).model
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {model.dtype}")
    rows = [_measure(model, batch, options) for batch in options.batch]
    if options.json:
        report = {"device": device, "jax": jax.__version__, "dtype": str(model.dtype), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _random(path: Path) -> GptOss:
    """A bfloat16 model with random weights, the experts in MXFP4 as the loader leaves them."""
    config = GptOssConfig.from_dict(json.loads(path.read_text()))
    specs = parameter_specs(config)
    get: Callable[[str], Tagged] = random_parameters(config, 0, jnp.bfloat16)
    pack = jax.jit(quantize_mxfp4)

    def packed(name: str) -> Tagged | BlockScaled | TiledMXFP4:
        return prepare_for_devices(pack(get(name))) if specs[name].is_expert_weight else get(name)

    return GptOss(config, packed, dtype=jnp.bfloat16)


def _measure(model: GptOss, batch: int, options: argparse.Namespace) -> dict:
    engine = Engine(model, context=options.prompt + options.tokens, batch=batch)
    rng = np.random.default_rng(0)
    decode, prefill, first = [], [], []
    for _ in range(options.runs + 1):
        prompts = rng.integers(0, model.config.vocab_size, (batch, options.prompt)).tolist()
        requests = [Request(p, max_tokens=options.tokens, stop_ids=()) for p in prompts]
        stream = engine.stream(requests)
        for _ in stream:
            pass
        found = stream.statistics
        if found.compile_seconds:
            continue
        decode.append(found.decoding.per_second or 0.0)
        prefill.append(found.prefill.per_second or 0.0)
        first.append(found.first_token_seconds)
    row = {
        "batch": batch,
        "decode_tokens_per_second": statistics.median(decode),
        "prefill_tokens_per_second": statistics.median(prefill),
        "first_token_seconds": statistics.median(first),
        "spread": [min(decode), max(decode)],
    }
    print(
        f"batch {batch:4d}: decode {row['decode_tokens_per_second']:9.1f} tokens/s "
        f"(min {min(decode):.1f}, max {max(decode):.1f}), "
        f"prefill {row['prefill_tokens_per_second']:9.1f} tokens/s, "
        f"first token after {row['first_token_seconds'] * 1e3:.1f} ms",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()

"""Trains gpt-oss-nano and writes it as an MXFP4 checkpoint in the layout of openai/gpt-oss-20b.

    python -m gpt_oss.nano.prepare --out data              # once: texts, vocabulary, chats
    python train.py --data data --out nano                 # minutes on a GPU, hours on a CPU

A run saves its state now and then; the same command goes on from there. The same seed on the same
hardware and versions gives the same model.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # as a script its folder is on the path, where its modules would pass for top-level ones
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent)] + [p for p in sys.path if p != str(folder)]

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from gpt_oss.config import GptOssConfig
from gpt_oss.evaluate import evaluate
from gpt_oss.initialization import random_parameters
from gpt_oss.layout import parameter_specs
from gpt_oss.model import GptOss
from gpt_oss.nano.shape import nano_config
from gpt_oss.training import (
    EXPERT_WEIGHTS,
    ParameterDict,
    TrainingConfig,
    TrainingData,
    TrainingState,
    initial_state,
    load_data,
    train_steps,
)
from gpt_oss.writer import write_checkpoint
from moe_jax import quantize_mxfp4

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, evaluates and writes."""
    options = _parse(argv)
    config = TrainingConfig(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(TrainingConfig)}
    )
    meta = json.loads((options.data / "meta.json").read_text())
    model_config = nano_config(meta["control_tokens"])
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options.data, config.length)
    state = run(model_config, config, data, options)
    report = {
        "bits_per_byte": {
            name: heldout_bits(values, model_config, config, options.data)
            for name, values in (
                ("bfloat16", {n: p.astype(jnp.bfloat16) for n, p in state.parameters.items()}),
                ("mxfp4", pack(state.parameters)),
            )
        },
        "heldout_bytes": meta["heldout"]["bytes"],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "training": dataclasses.asdict(config),
    }
    (options.out / "model.safetensors").unlink(missing_ok=True)
    start = {"bos_token_id": meta["control_tokens"]["<|startoftext|>"]}
    packed = pack(state.parameters)
    write_checkpoint(options.out, model_config, packed.__getitem__, generation_config=start)
    for name in TOKENIZER_FILES:
        shutil.copy(options.data / name, options.out / name)
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["bits_per_byte"]))


def run(
    model_config: GptOssConfig,
    config: TrainingConfig,
    data: TrainingData,
    options: argparse.Namespace,
) -> TrainingState:
    """Trains from the saved state, or from the beginning."""
    saved = options.out / "state.msgpack"
    state = initial_state(initial_parameters(model_config, config.seed), config)
    if saved.exists():
        state = _restore(state, saved.read_bytes())
        print(f"resumed at step {int(state.step)}", flush=True)
    quantize_at = int(config.steps * config.quantize_from)
    started = time.monotonic()
    while (step := int(state.step)) < config.steps:
        end = config.steps if step >= quantize_at else max(quantize_at, 1)
        count = min(options.log_every, end - step)
        state, losses = train_steps(
            state,
            data,
            model_config=model_config,
            config=config,
            count=count,
            quantize=step >= quantize_at,
        )
        means = {name: float(values.mean()) for name, values in losses.items()}
        if not np.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']} by step {int(state.step)}")
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"step {int(state.step):6d}  {text}  {time.monotonic() - started:.0f} s", flush=True)
        if int(state.step) // options.save_every > step // options.save_every:
            _save(state, saved)
            value = heldout_bits(state.parameters, model_config, config, options.data)
            print(f"step {int(state.step):6d}  held-out bits per byte {value:.4f}", flush=True)
    _save(state, saved)
    return state


def initial_parameters(model_config: GptOssConfig, seed: int) -> ParameterDict:
    """Random float32 parameters by name."""
    get = random_parameters(model_config, seed, jnp.float32)
    return {name: get(name) for name in parameter_specs(model_config)}


def pack(parameters: ParameterDict) -> dict:
    """The parameters as checkpoints hold them: experts in MXFP4, all else in bfloat16."""
    return {
        name: quantize_mxfp4(value) if name.endswith(EXPERT_WEIGHTS) else value.astype(jnp.bfloat16)
        for name, value in parameters.items()
    }


def heldout_bits(
    parameters: dict, model_config: GptOssConfig, config: TrainingConfig, folder: Path
) -> float:
    """Bits per byte of the held-out text by the model of these parameters, in float32."""
    tokens = np.load(folder / "heldout.npy").astype(np.int32)
    num_bytes = json.loads((folder / "meta.json").read_text())["heldout"]["bytes"]
    model = GptOss(
        model_config, parameters.__getitem__, dtype=jnp.float32, algorithm=config.algorithm
    )
    stride = config.length // 2
    return evaluate(model, tokens, num_bytes, length=config.length, stride=stride).bits_per_byte


def _save(state: TrainingState, path: Path) -> None:
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = path.with_suffix(".partial")
    partial.write_bytes(serialization.msgpack_serialize(leaves))
    partial.replace(path)


def _restore(like: TrainingState, content: bytes) -> TrainingState:
    leaves, treedef = jax.tree.flatten(like)
    saved = serialization.msgpack_restore(content)
    restored = [jnp.asarray(saved[str(i)]) for i in range(len(saved))]
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in restored]:
        raise ValueError("the saved state is of another model; choose another --out")
    return jax.tree.unflatten(treedef, restored)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of gpt_oss.nano.prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--log-every", type=int, default=50, help="steps in one call")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states")
    for field in dataclasses.fields(TrainingConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

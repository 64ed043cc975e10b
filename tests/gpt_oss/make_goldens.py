"""Writes `goldens.npz`: what Hugging Face transformers computes for the tiny checkpoints.

Run by hand when the tiny configurations change; tests only read the result. The stored file was
made with Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6:

    python3.11 -m venv goldens && goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    goldens/bin/python tests/gpt_oss/make_goldens.py

Everything is float32, with eager attention and eager experts, on weights that transformers decodes
from MXFP4 itself. Keys, with `config` and `prompt` as in `tiny.CONFIGS` and `tiny.prompts`:

    config/sha256              str, of the tensors (see `tiny.fingerprint`)
    config/prompt/positions    [P], the positions whose logits are kept
    config/prompt/logits       [P, V]
    config/prompt/argmax       [T], at every position
    config/greedy              [tiny.GREEDY_TOKENS], after the prompt "below_window", with a cache;
                               end of text does not end it
    config/rope/frequencies    [D / 2]
    config/rope/cos, sin       [len(ROPE_POSITIONS), D / 2]
    config/shifted/logits      [V], last position of "several_windows" put at SHIFT and after
    released_numbers/router_ids, router_weights    [L, T, K] for the prompt "several_windows"
    config/layer_router/ids, weights    [LAYER_TOKENS, K], the router of layer 0 alone, on
                                        `tiny.hidden_states(config, LAYER_TOKENS)`
    config/layer_experts                [LAYER_TOKENS, H], the experts of layer 0 alone, on the same
                                        and `tiny.routing(config, LAYER_TOKENS)`
    rope_positions, shift, layer_tokens    the constants
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

ROPE_POSITIONS = [0, 1, 7, 127, 128, 4095, 4096, 65535, 131071]
SHIFT = 4090
LAYER_TOKENS = 5
ROUTING_CONFIG = "released_numbers"


def load(name: str) -> Any:
    """The transformers model of configuration `name`."""
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            tiny.write(name, Path(folder)),
            quantization_config=Mxfp4Config(dequantize=True),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    return model.eval()


def kept_positions(length: int) -> list[int]:
    """Positions whose logits are stored: the ends and the middle, or the last of a long prompt."""
    if length > 1000:
        return [4095, 4096, length - 2, length - 1]
    return sorted({0, length // 2, length - 1})


def prompt_goldens(model: Any, name: str) -> dict[str, np.ndarray]:
    """Logits and argmax of every prompt of a configuration."""
    out = {}
    for label, tokens in tiny.prompts(name).items():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        positions = kept_positions(len(tokens))
        out[f"{label}/positions"] = np.array(positions, np.int32)
        out[f"{label}/logits"] = logits[positions]
        out[f"{label}/argmax"] = logits.argmax(-1).astype(np.int16)
    return out


def shifted_logits(model: Any, name: str) -> np.ndarray:
    """The last logits of a prompt whose first token stands at position SHIFT."""
    tokens = torch.tensor([tiny.prompts(name)["several_windows"]])
    positions = SHIFT + torch.arange(tokens.shape[1])[None]
    return model(tokens, position_ids=positions, use_cache=False).logits[0, -1].numpy()


def greedy(model: Any, name: str) -> np.ndarray:
    """Greedy tokens, one a step, with transformers' own cache."""
    tokens, cache = torch.tensor([tiny.prompts(name)["below_window"]]), None
    out = []
    for _ in range(tiny.GREEDY_TOKENS):
        step = model(tokens, past_key_values=cache, use_cache=True)
        tokens, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
        out.append(int(tokens))
    return np.array(out, np.int16)


def rope(model: Any) -> dict[str, np.ndarray]:
    """Frequencies, and cos and sin at ROPE_POSITIONS."""
    embedding = model.model.rotary_emb
    cos, sin = embedding(torch.zeros(1), torch.tensor([ROPE_POSITIONS]))
    return {
        "rope/frequencies": embedding.inv_freq.numpy(),
        "rope/cos": cos[0].numpy(),
        "rope/sin": sin[0].numpy(),
    }


def routings(model: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of every layer for one prompt, taken where the routers return them."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _m, _i, out: seen.append(out[1:]))
        for layer in model.model.layers
    ]
    model(torch.tensor([tiny.prompts(name)["several_windows"]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    weights, ids = (torch.stack(part).numpy() for part in zip(*seen, strict=True))
    return ids.astype(np.int16), weights


def layer_goldens(model: Any, name: str) -> dict[str, np.ndarray]:
    """The router and the experts of the first layer, each by itself."""
    x = torch.tensor(tiny.hidden_states(name, LAYER_TOKENS))
    mlp = model.model.layers[0].mlp
    _, weights, ids = mlp.router(x)
    given_ids, given_weights = (torch.tensor(part) for part in tiny.routing(name, LAYER_TOKENS))
    return {
        "layer_router/ids": ids.numpy().astype(np.int16),
        "layer_router/weights": weights.numpy(),
        "layer_experts": mlp.experts(x, given_ids, given_weights).numpy(),
    }


@torch.no_grad()
def goldens(name: str) -> dict[str, np.ndarray]:
    """Everything stored of one configuration, without the configuration's name in the keys."""
    model = load(name)
    out = {
        "sha256": np.array(tiny.fingerprint(name)),
        **prompt_goldens(model, name),
        **layer_goldens(model, name),
        **rope(model),
        "greedy": greedy(model, name),
        "shifted/logits": shifted_logits(model, name),
    }
    if name == ROUTING_CONFIG:
        out["router_ids"], out["router_weights"] = routings(model, name)
    return out


def main() -> None:
    """Writes the file next to this script."""
    arrays = {
        "rope_positions": np.array(ROPE_POSITIONS),
        "shift": np.array(SHIFT),
        "layer_tokens": np.array(LAYER_TOKENS),
    }
    for name in tiny.CONFIGS:
        arrays.update({f"{name}/{key}": value for key, value in goldens(name).items()})
    path = Path(__file__).with_name("goldens.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

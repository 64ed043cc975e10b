"""gpt-oss in NumPy float64, written from the model's definition to be read rather than to be fast.

No cache, no batching, no padding, no fused step: every position attends to an explicit slice of
the positions before it, and every token visits its experts one expert at a time. What the rest of
the code does in a cleverer way must agree with this. The tests compare it with Hugging Face
transformers, so it is an oracle in its own right and not a mirror of the JAX model.

Axis letters: T tokens, H hidden, I intermediate, E experts, K experts per token, L layers,
N query heads, G key/value heads, D head dimension, V vocabulary.

Sources: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025); Peng et al., "YaRN" (2023); Open
Compute Project, "Microscaling Formats (MX) v1.0" (2023); Xiao et al., "Efficient Streaming
Language Models with Attention Sinks" (2023).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from mxfp4_oracle import decode_mxfp4

Array = np.ndarray
Config = Mapping[str, Any]
Weights = Mapping[str, Array]

SIGMOID_SLOPE = 1.702

_FILE_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "U8": np.uint8,
}


@dataclass(frozen=True)
class Forward:
    """What one pass over a sequence computes.

    Attributes:
        logits: [T, V].
        router_ids: [L, T, K], the chosen experts, the highest router logit first.
        router_weights: [L, T, K], their weights; the K weights of a token sum to 1.
        router_logits: [L, T, E].
    """

    logits: Array
    router_ids: Array
    router_weights: Array
    router_logits: Array


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder."""
    return json.loads((folder / "config.json").read_text())


def read_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of every `*.safetensors` file of `folder`, in the dtype of the file."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(data[begin:end], _FILE_DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def weights(source: Path | str | Mapping[str, Array]) -> dict[str, Array]:
    """Float64 weights under the checkpoint's names.

    Args:
        source: a checkpoint folder, the tensors of one, or what this function returned before.

    Returns:
        The same names, except that `X_blocks` and `X_scales` become `X` [E, out, in].
    """
    tensors = source if isinstance(source, Mapping) else read_tensors(Path(source))
    decoded: dict[str, Array] = {}
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            decoded[stem] = decode_mxfp4(value, tensors[stem + "_scales"])
        elif not name.endswith("_scales"):
            decoded[name] = value.astype(np.float64, copy=False)
    return decoded


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """`x` [T, H] over its root mean square, times `weight` [H]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def rope_parameters(config: Config) -> dict[str, Any]:
    """The YaRN numbers, spelled `rope_parameters` or `rope_scaling` and `rope_theta`."""
    if "rope_parameters" in config:
        parameters = dict(config["rope_parameters"])
    else:
        parameters = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    expected = {
        "beta_fast",
        "beta_slow",
        "factor",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_type",
        "truncate",
    }
    if parameters.keys() != expected or parameters["rope_type"] != "yarn":
        raise ValueError(f"expected a yarn rope with {sorted(expected)}, got {parameters}")
    return parameters


def rope_frequencies(config: Config) -> tuple[Array, float]:
    """Angle per position of each pair of dimensions, and the factor on cos and sin.

    A pair that turns more than `beta_fast` times within the original context keeps its frequency,
    one that turns less than `beta_slow` times has it divided by `factor`, and between the two
    there is a linear ramp over the index of the pair.

    Returns:
        Float64 [D / 2] in radians per position, and the attention factor.
    """
    p = rope_parameters(config)
    dim = config["head_dim"]

    def pair_that_turns(times: float) -> float:
        period = p["original_max_position_embeddings"] / times
        return dim * np.log(period / (2 * np.pi)) / (2 * np.log(p["rope_theta"]))

    low, high = pair_that_turns(p["beta_fast"]), pair_that_turns(p["beta_slow"])
    if p["truncate"]:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pair = np.arange(dim // 2)
    interpolated = np.clip((pair - low) / (high - low), 0, 1)
    frequencies = p["rope_theta"] ** (-2 * pair / dim)
    frequencies = frequencies * (1 - interpolated + interpolated / p["factor"])
    return frequencies, 0.1 * np.log(p["factor"]) + 1 if p["factor"] > 1 else 1.0


def rope_tables(
    config: Config, positions: Sequence[int] | Array, angle_dtype: type[np.floating] = np.float64
) -> tuple[Array, Array]:
    """cos and sin, float64 [T, D / 2] each, attention factor included, at `positions` [T].

    `angle_dtype` rounds frequencies and angles. Implementations take float32, whose angle at
    position p is off by up to p * 2**-23 radians: far out this, and not their arithmetic, is what
    keeps them from the exact numbers.
    """
    frequencies, factor = rope_frequencies(config)
    angles = np.asarray(positions, angle_dtype)[:, None] * frequencies.astype(angle_dtype)
    angles = angles.astype(np.float64)
    return np.cos(angles) * factor, np.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns dimension i and i + D / 2 of `x` [T, heads, D] by the angles of [T, D / 2] tables."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: Array, k: Array, v: Array, sinks: Array, window: int | None) -> Array:
    """Causal attention with one sink a head.

    The sink is a logit that takes part in the softmax and has no value. With a window, a query
    sees itself and the `window - 1` positions before it.

    Args:
        q: [T, N, D].
        k, v: [T, G, D]; query head n reads key/value head n // (N / G).
        sinks: [N].
        window: how many positions a query sees, or None for all before it.

    Returns:
        [T, N, D].
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    out = np.empty_like(q)
    for t in range(len(q)):
        begin = 0 if window is None else max(0, t + 1 - window)
        scores = np.einsum("nd,snd->ns", q[t], k[begin : t + 1]) / np.sqrt(q.shape[-1])
        largest = np.maximum(scores.max(axis=-1), sinks)
        scores = np.exp(scores - largest[:, None])
        total = scores.sum(axis=-1) + np.exp(sinks - largest)
        out[t] = np.einsum("ns,snd->nd", scores / total[:, None], v[begin : t + 1])
    return out


def linear(w: Weights, name: str, x: Array) -> Array:
    """`x` [T, in] through the projection `name`, weight [out, in] and bias [out]."""
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def attention(w: Weights, config: Config, layer: int, x: Array, cos: Array, sin: Array) -> Array:
    """The attention block of one layer on normalised hidden states `x` [T, H] -> [T, H]."""
    name = f"model.layers.{layer}.self_attn."
    q, k, v = (
        linear(w, f"{name}{part}_proj", x).reshape(len(x), -1, config["head_dim"]) for part in "qkv"
    )
    sliding = config["layer_types"][layer] == "sliding_attention"
    window = config["sliding_window"] if sliding else None
    mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, w[name + "sinks"], window)
    return linear(w, name + "o_proj", mixed.reshape(len(x), -1))


def route(w: Weights, config: Config, layer: int, x: Array) -> tuple[Array, Array, Array]:
    """The experts of each token of `x` [T, H]: ids [T, K], weights [T, K], logits [T, E].

    The softmax is over the K chosen logits. Of equal logits the lower expert comes first.
    """
    logits = linear(w, f"model.layers.{layer}.mlp.router", x)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
    chosen = np.take_along_axis(logits, ids, axis=-1)
    chosen = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    return ids, chosen / chosen.sum(axis=-1, keepdims=True), logits


def clamped_swiglu(config: Config, gate_up: Array) -> Array:
    """[..., 2 I] with gate at even and up at odd places -> [..., I].

    The slope is the released model's unless the config has the `swiglu_alpha` of transformers 5.
    """
    limit, slope = config["swiglu_limit"], config.get("swiglu_alpha", SIGMOID_SLOPE)
    gate = np.minimum(gate_up[..., 0::2], limit)
    up = np.clip(gate_up[..., 1::2], -limit, limit)
    return gate / (1 + np.exp(-slope * gate)) * (up + 1)


def experts(w: Weights, config: Config, layer: int, x: Array, ids: Array, scores: Array) -> Array:
    """The weighted sum of the chosen experts; routing done by the caller.

    Args:
        x: [T, H].
        ids: [T, K]; an expert named twice by a token counts twice.
        scores: [T, K], used as they are.

    Returns:
        [T, H].
    """
    name = f"model.layers.{layer}.mlp.experts."
    out = np.zeros_like(x)
    for expert in range(config["num_local_experts"]):
        tokens, slots = np.nonzero(ids == expert)
        gate_up = x[tokens] @ w[name + "gate_up_proj"][expert].T
        hidden = clamped_swiglu(config, gate_up + w[name + "gate_up_proj_bias"][expert])
        result = hidden @ w[name + "down_proj"][expert].T + w[name + "down_proj_bias"][expert]
        np.add.at(out, tokens, result * scores[tokens, slots, None])
    return out


def forward(
    source: Path | str | Mapping[str, Array],
    config: Config,
    token_ids: Sequence[int] | Array,
    first_position: int = 0,
    angle_dtype: type[np.floating] = np.float64,
) -> Forward:
    """One pass over `token_ids` [T], whose first token stands at `first_position`.

    `angle_dtype` is that of `rope_tables`.
    """
    w, epsilon = weights(source), config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][np.asarray(token_ids)]
    cos, sin = rope_tables(config, first_position + np.arange(len(x)), angle_dtype)
    routings = []
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = rms_norm(x, w[name + "input_layernorm.weight"], epsilon)
        x = x + attention(w, config, layer, normed, cos, sin)
        normed = rms_norm(x, w[name + "post_attention_layernorm.weight"], epsilon)
        routings.append(route(w, config, layer, normed))
        x = x + experts(w, config, layer, normed, *routings[-1][:2])
    out = rms_norm(x, w["model.norm.weight"], epsilon) @ w["lm_head.weight"].T
    ids, router_weights, router_logits = (np.stack(part) for part in zip(*routings, strict=True))
    return Forward(out, ids, router_weights, router_logits)


def logits(
    source: Path | str | Mapping[str, Array],
    config: Config,
    token_ids: Sequence[int] | Array,
    first_position: int = 0,
    angle_dtype: type[np.floating] = np.float64,
) -> Array:
    """Float64 [T, V]: what follows each of `token_ids` [T]; arguments as for `forward`."""
    return forward(source, config, token_ids, first_position, angle_dtype).logits


def greedy(
    source: Path | str | Mapping[str, Array],
    config: Config,
    prompt: Sequence[int] | Array,
    count: int,
) -> list[int]:
    """The `count` most likely next tokens, one after the other, each from a fresh pass over all."""
    w, tokens = weights(source), list(map(int, prompt))
    for _ in range(count):
        tokens.append(int(logits(w, config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]

"""Tiny gpt-oss checkpoints with random weights, in the file layout of the released models.

Names, shapes, dtypes and the numbering of the shards are those of openai/gpt-oss-20b: BF16 for
all tensors but the MXFP4 blocks and scales, which are U8. Only NumPy is needed, so that any
implementation can be given the same bytes.

Weights are scaled so that the router is decided, the clamp of the experts bites now and
then, and logits spread over several units. The seeds were chosen so that, over the prompts of the
golden file, neither a router decision nor an argmax is near a tie.
"""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_configs import CONFIGS, SEEDS, Style, config

Array = np.ndarray

GREEDY_TOKENS = 64

_E2M1_RMS = 2.926  # of the 16 codes taken equally often
_FILE_DTYPES = {
    "uint16": "BF16",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "float32": "F32",
}


def prompts(name: str) -> dict[str, list[int]]:
    """Prompts of configuration `name`, by their length relative to its window."""
    window = CONFIGS[name]["sliding_window"]
    lengths = {
        "below_window": window - 1,
        "at_window": window,
        "above_window": window + 1,
        "several_windows": 3 * window + 5,
    }
    if name == "long_context":
        lengths["past_4096"] = 4200
    return {label: prompt(name, length) for label, length in lengths.items()}


def prompt(name: str, length: int) -> list[int]:
    """`length` random token ids of configuration `name`, end of text and padding left out."""
    rng = np.random.default_rng([SEEDS[name], length])
    return rng.integers(CONFIGS[name]["vocab_size"] - 2, size=length).tolist()


def hidden_states(name: str, length: int) -> Array:
    """Float32 [length, hidden_size] with unit variance, exact in BF16."""
    rng = np.random.default_rng([SEEDS[name], length, 1])
    values = rng.standard_normal((length, CONFIGS[name]["hidden_size"]))
    return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)


def routing(name: str, length: int) -> tuple[Array, Array]:
    """A made-up routing: ids int64 and weights float32, [length, experts_per_token] each.

    Its weights sum to anything, and where there are several, the first token names one expert
    twice: what experts must do with a routing that is not theirs.
    """
    rng = np.random.default_rng([SEEDS[name], length, 2])
    experts, chosen = CONFIGS[name]["num_local_experts"], CONFIGS[name]["num_experts_per_tok"]
    ids = np.stack([rng.permutation(experts)[:chosen] for _ in range(length)])
    ids[0, -1] = ids[0, 0]
    return ids, rng.standard_normal(ids.shape).astype(np.float32)


def bfloat16_bits(values: Array) -> Array:
    """The BF16 encoding, uint16, of finite numbers; rounds to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def pack_mxfp4(codes: Array) -> Array:
    """E2M1 codes uint8 [..., K] -> blocks uint8 [..., K / 32, 16], even element in the low half."""
    grouped = codes.reshape(*codes.shape[:-1], -1, 16, 2)
    return grouped[..., 0] | grouped[..., 1] << 4


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype ("BF16" or "U8") and shape of each tensor of a checkpoint, by name."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    dim, experts = config["head_dim"], config["num_local_experts"]
    queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        bf16: dict[str, tuple[int, ...]] = {"self_attn.sinks": (queries,)}
        for part, rows in (("q", queries * dim), ("k", keys * dim), ("v", keys * dim)):
            bf16[f"self_attn.{part}_proj.weight"] = (rows, hidden)
            bf16[f"self_attn.{part}_proj.bias"] = (rows,)
        bf16["self_attn.o_proj.weight"] = (hidden, queries * dim)
        bf16["self_attn.o_proj.bias"] = (hidden,)
        bf16["input_layernorm.weight"] = bf16["post_attention_layernorm.weight"] = (hidden,)
        bf16["mlp.router.weight"], bf16["mlp.router.bias"] = (experts, hidden), (experts,)
        for part, rows, columns in (
            ("gate_up_proj", 2 * inter, hidden),
            ("down_proj", hidden, inter),
        ):
            stem = f"{name}mlp.experts.{part}"
            out[stem + "_blocks"] = ("U8", (experts, rows, columns // 32, 16))
            out[stem + "_scales"] = ("U8", (experts, rows, columns // 32))
            bf16[f"mlp.experts.{part}_bias"] = (experts, rows)
        out.update({name + key: ("BF16", shape) for key, shape in bf16.items()})
    table = (config["vocab_size"], hidden)
    out["model.embed_tokens.weight"] = out["lm_head.weight"] = ("BF16", table)
    out["model.norm.weight"] = ("BF16", (hidden,))
    return out


# Standard deviations; a matrix's is further divided by the root of its number of inputs.
_SPREAD = {
    "sinks": 1.0,
    "q_proj.weight": 1.5,
    "k_proj.weight": 1.5,
    "router.weight": 2.0,
    "lm_head.weight": 1.5,
    "gate_up_proj_scales": 2.5,
    "down_proj_scales": 0.5,
    "bias": 0.2,
}


def tensors(name: str) -> dict[str, Array]:
    """The checkpoint of configuration `name`: uint16 arrays hold BF16, uint8 arrays U8."""
    return {
        key: _tensor(key, shape, np.random.default_rng([SEEDS[name], zlib.crc32(key.encode())]))
        for key, (_, shape) in shapes(CONFIGS[name]).items()
    }


def _tensor(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    spread = next((value for end, value in _SPREAD.items() if key.endswith(end)), 1.0)
    if key.endswith("_blocks"):
        return pack_mxfp4(rng.integers(16, size=(*shape[:-1], 32), dtype=np.uint8)).reshape(shape)
    if key.endswith("_scales"):
        exponent = np.log2(spread / _E2M1_RMS / np.sqrt(32 * shape[-1]))
        return np.rint(127 + exponent + rng.uniform(-1.5, 1.5, shape)).astype(np.uint8)
    values = spread * rng.standard_normal(shape)
    if "norm" in key:
        values = 1 + 0.2 * values
    elif len(shape) == 2 and not key.endswith("bias") and "embed" not in key:
        values /= np.sqrt(shape[1])
    return bfloat16_bits(values)


def fingerprint(name: str) -> str:
    """SHA-256 of the tensors, to tell whether a stored result belongs to these weights."""
    return hashlib.sha256(safetensors_bytes(tensors(name))).hexdigest()


def write(name: str, folder: Path, shards: int = 2, style: Style = "released") -> Path:
    """Writes the checkpoint of configuration `name` into `folder`, which it returns."""
    return write_files(folder, config(name, style), tensors(name), shards)


def write_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], shards: int = 2
) -> Path:
    """Writes `config.json` and the tensors: one file, or an index and numbered shards.

    The shards are numbered from 0 and the number after "of" is that of the last one, as released.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    names = sorted(tensors, key=_release_order)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    groups = {
        f"model-{shard:05d}-of-{shards - 1:05d}.safetensors": [
            key for place, key in enumerate(names) if place * shards // len(names) == shard
        ]
        for shard in range(shards)
    }
    for file, keys in groups.items():
        (folder / file).write_bytes(safetensors_bytes({key: tensors[key] for key in keys}))
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
        "weight_map": {key: file for file, keys in groups.items() for key in keys},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def safetensors_bytes(tensors: Mapping[str, Array]) -> bytes:
    """The contents of a safetensors file, two-byte tensors first as in the released files."""
    keys = sorted(tensors, key=lambda key: (-tensors[key].itemsize, key))
    header, end = {}, 0
    for key in keys:
        begin, end = end, end + tensors[key].nbytes
        header[key] = {
            "dtype": _FILE_DTYPES[tensors[key].dtype.name],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(tensors[key]).tobytes() for key in keys]
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def _release_order(key: str) -> list[str | int]:
    """Layers in the order of their numbers as text, as in the released shards, then the rest."""
    layer = re.match(r"model\.layers\.(\d+)\.", key)
    return ["0", layer[1], key] if layer else ["1", key]

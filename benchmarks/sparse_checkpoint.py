"""Writes a checkpoint with the released names, shapes and dtypes, and no weights.

    python benchmarks/sparse_checkpoint.py 20b FOLDER

Data are holes in sparse files, so that the 13.76 GB of gpt-oss-20b take a few hundred kB of disk,
and every weight reads as zero. For testing the loader's memory and progress without a download.
"""

import argparse
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NUM_LAYERS_AND_EXPERTS = {"20b": (24, 32), "120b": (36, 128)}
VOCAB = 201088
SHARD_BYTES = 4_800_000_000

type Tensors = dict[str, tuple[str, list[int]]]


def tensors(
    num_layers: int,
    num_experts: int,
    *,
    hidden: int = 2880,
    intermediate: int = 2880,
    heads: int = 64,
    kv_heads: int = 8,
    head_dim: int = 64,
    vocab: int = VOCAB,
) -> Tensors:
    """Dtype and shape of every tensor by name."""
    table: Tensors = {}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"{prefix}{norm}.weight"] = ("BF16", [hidden])
        attention = prefix + "self_attn."
        table[attention + "sinks"] = ("BF16", [heads])
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            table[f"{attention}{part}_proj.weight"] = ("BF16", [count * head_dim, hidden])
            table[f"{attention}{part}_proj.bias"] = ("BF16", [count * head_dim])
        table[attention + "o_proj.weight"] = ("BF16", [hidden, heads * head_dim])
        table[attention + "o_proj.bias"] = ("BF16", [hidden])
        table[prefix + "mlp.router.weight"] = ("BF16", [num_experts, hidden])
        table[prefix + "mlp.router.bias"] = ("BF16", [num_experts])
        for part, rows, columns in (
            ("gate_up_proj", 2 * intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ):
            experts = f"{prefix}mlp.experts.{part}"
            table[experts + "_blocks"] = ("U8", [num_experts, rows, columns // 32, 16])
            table[experts + "_scales"] = ("U8", [num_experts, rows, columns // 32])
            table[experts + "_bias"] = ("BF16", [num_experts, rows])
    table["model.embed_tokens.weight"] = table["lm_head.weight"] = ("BF16", [vocab, hidden])
    table["model.norm.weight"] = ("BF16", [hidden])
    return table


def config(num_layers: int, num_experts: int, vocab: int = VOCAB) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": vocab - 1,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (num_layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 8,
        "num_local_experts": num_experts,
        "output_router_logits": False,
        "pad_token_id": vocab - 2,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
    }


def nbytes(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor."""
    size = {"BF16": 2, "U8": 1}[dtype]
    for length in shape:
        size *= length
    return size


def split(table: Tensors, limit: int = SHARD_BYTES) -> list[list[str]]:
    """Names of the tensors of each shard, filled in order up to `limit` bytes."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in table.items():
        size = nbytes(dtype, shape)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_file(path: Path, table: Mapping[str, tuple[str, list[int]]]) -> None:
    """Writes a header and leaves a hole as long as the data."""
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(table, key=lambda name: (table[name][0], name)):  # BF16 before U8
        dtype, shape = table[name]
        begin, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write(folder: Path, num_layers: int, num_experts: int, vocab: int = VOCAB) -> int:
    """Writes the checkpoint and returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    table = tensors(num_layers, num_experts, vocab=vocab)
    groups = split(table)
    weight_map: dict[str, str] = {}
    for place, names in enumerate(groups):
        file = f"model-{place:05d}-of-{len(groups) - 1:05d}.safetensors"
        write_file(folder / file, {name: table[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(nbytes(*spec) for spec in table.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    contents = config(num_layers, num_experts, vocab)
    (folder / "config.json").write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=NUM_LAYERS_AND_EXPERTS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    total = write(arguments.folder, *NUM_LAYERS_AND_EXPERTS[arguments.model])
    print(f"{total:,} bytes of tensors")


if __name__ == "__main__":
    main()

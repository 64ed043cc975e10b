"""Writing a gpt-oss checkpoint in the layout of openai/gpt-oss-20b.

What is written loads with `gpt_oss.loader` and with the transformers library: config.json,
generation_config.json, and safetensors without metadata, one file or shards with an index.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from gpt_oss.config import GptOssConfig
from gpt_oss.layout import ParameterSpec, parameter_specs
from moe_jax.activations import GPT_OSS_ACTIVATION
from moe_jax.checkpoint import INDEX_FILE, SINGLE_FILE
from moe_jax.experts.prepare import restore_experts
from moe_jax.quantization.mxfp4 import BLOCK_SIZE, BlockScaled
from moe_jax.quantization.packed import Packed
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import Tagged

MAX_SHARD_BYTES = 4_800_000_000
"""Bytes of tensors in a shard at most, unless a single tensor has more."""

_SWIGLU_ALPHA = GPT_OSS_ACTIVATION.alpha  # what readers assume where config.json says nothing


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: GptOssConfig,
    parameters: Callable[[str], Tagged | Packed],
    *,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model's parameters and configuration into a folder, which is made if need be.

    Experts' weights that are packed become `..._blocks` and `..._scales`; float ones are written
    as the transformers library does, transposed to {expert, in, out}.

    Args:
        folder: where to; must not hold weights yet.
        config: the model's shape. Whether it is written as quantised depends on `parameters`.
        parameters: gives each parameter by its name in `layout.parameter_specs`.
        dtype: float dtype to write; None keeps that of each parameter.
        max_shard_bytes: from how many bytes on to begin another file.
        generation_config: further fields of generation_config.json, such as `bos_token_id`.

    Raises:
        FileExistsError: the folder holds weights.
        ValueError: a parameter does not have the axes and sizes of its specification.
        TypeError: a parameter is packed in another format than MXFP4.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = [path.name for path in folder.glob("*.safetensors*")]
    if present:
        raise FileExistsError(f"{folder} holds {', '.join(sorted(present))}: choose another folder")
    specs = parameter_specs(config)
    groups = _group(specs, parameters, dtype, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(groups) > 1:  # numbered from 0, the number after "of" being the last one's
        files = [f"model-{n:05d}-of-{len(groups) - 1:05d}.safetensors" for n in range(len(groups))]
    places: dict[str, str] = {}
    total = 0
    for file, group in zip(files, groups, strict=True):
        tensors: dict[str, np.ndarray] = {}
        for name in group:
            tensors.update(_host_tensors(specs[name], parameters(name), dtype))
        save_file(tensors, folder / file)
        places.update(dict.fromkeys(tensors, file))
        total += sum(array.nbytes for array in tensors.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / INDEX_FILE, index)
    quantized = any(name.endswith("_blocks") for name in places)
    _write_json(folder / "config.json", _config_fields(config, quantized))
    _write_json(folder / "generation_config.json", _generation_fields(config, generation_config))


def _group(
    specs: Mapping[str, ParameterSpec],
    parameters: Callable[[str], Tagged | Packed],
    dtype: Any,
    max_shard_bytes: int,
) -> list[list[str]]:
    """Names of the parameters of each shard, after a check of every parameter."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _checked_nbytes(spec, parameters(name), dtype)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _checked_nbytes(spec: ParameterSpec, parameter: Tagged | Packed, dtype: Any) -> int:
    """Bytes that a parameter takes in a file. Raises where it is not as specified."""
    if parameter.axes != spec.axes or parameter.shape != spec.shape:
        raise ValueError(
            f"{spec.name}: expected axes {spec.axes} of sizes {spec.shape}, got {parameter}"
        )
    if not isinstance(parameter, Tagged):
        if not isinstance(parameter, BlockScaled | TiledMXFP4):
            raise TypeError(
                f"{spec.name}: gpt-oss checkpoints hold floats or MXFP4, got "
                f"{type(parameter).__name__}: decode it with dequantize"
            )
        return math.prod(spec.shape) // BLOCK_SIZE * (BLOCK_SIZE // 2 + 1)
    return math.prod(spec.shape) * jnp.dtype(dtype or parameter.dtype).itemsize


def _host_tensors(
    spec: ParameterSpec, parameter: Tagged | Packed, dtype: Any
) -> dict[str, np.ndarray]:
    """A parameter as the checkpoint's tensors."""
    parameter = restore_experts(parameter)
    if isinstance(parameter, BlockScaled):
        return {
            spec.name + "_blocks": np.asarray(parameter.blocks.array),
            spec.name + "_scales": np.asarray(parameter.scales.array),
        }
    assert isinstance(parameter, Tagged)  # nothing tiled is left
    array = np.asarray(parameter.array)
    if spec.is_expert_weight:
        array = array.swapaxes(-1, -2)
    return {spec.name: np.ascontiguousarray(array.astype(dtype or array.dtype, copy=False))}


def _config_fields(config: GptOssConfig, quantized: bool) -> dict[str, Any]:
    fields = dataclasses.replace(config, quant_method="mxfp4" if quantized else None).to_dict()
    if fields["swiglu_alpha"] == _SWIGLU_ALPHA:
        del fields["swiglu_alpha"]
    return {**fields, "output_router_logits": False, "use_cache": True}


def _generation_fields(
    config: GptOssConfig, generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    fields = {
        "do_sample": True,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    return {**fields, **(generation_config or {})}


def _write_json(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Tiny layers in files of every format, for tests of the command line."""

from collections.abc import Callable
from pathlib import Path

import infmoe_files
import layer_oracle
import numpy as np
from safetensors.numpy import save_file

from moe_jax import (
    GPT_OSS_ACTIVATION,
    Activation,
    GptOssMLP,
    MoE,
    Router,
    quantize_mxfp4,
    tag,
)
from moe_jax.formats import gpt_oss, infmoe, openvino, torch
from moe_jax.formats.infmoe.attributes_file import write_attributes
from moe_jax.formats.onnx import custom, dense, microsoft

NORMALIZED = Router(order="before_top_k", renormalize=True)
RNG = np.random.default_rng(5)
EXPERTS, HIDDEN, INTERMEDIATE, PER_TOKEN = 5, 4, 7, 2


def _bias(experts: int):
    return tag(layer_oracle.random_array(RNG, np.float32, experts), "expert")


def _gpt_oss() -> MoE:
    experts = layer_oracle.gpt_oss(RNG, 5, 6, 9, GPT_OSS_ACTIVATION)
    return layer_oracle.moe(RNG, experts, 5, 6, 2, router_bias=_bias(5))


def _mxfp4() -> MoE:
    wide = layer_oracle.gpt_oss(RNG, 3, 64, 32, GPT_OSS_ACTIVATION)
    packed = GptOssMLP(
        quantize_mxfp4(wide.gate_up), wide.gate_up_bias, quantize_mxfp4(wide.down), wide.down_bias
    )
    return layer_oracle.moe(RNG, packed, 3, 64, 2, router_bias=_bias(3))


DROPLESS = layer_oracle.gelu_layer(RNG, router=NORMALIZED)
MIXTRAL = layer_oracle.moe(
    RNG,
    layer_oracle.gated(RNG, 5, 4, 7, Activation("swiglu"), biases=False),
    EXPERTS,
    HIDDEN,
    PER_TOKEN,
    router=NORMALIZED,
)
GPT_OSS = _gpt_oss()
MXFP4 = _mxfp4()
INFMOE = infmoe_files.layer_of(RNG, "base_layer")
NAME = "blocks.1.mlp"


def _state(layer: MoE, layout: torch.Layout) -> Callable[[Path], None]:
    return lambda path: torch.write(path, {NAME: layer}, layout)


def _infmoe(path: Path) -> None:
    write_attributes(infmoe.write_layer(INFMOE, path), path.with_suffix(".plugin.npz"))


def _mxfp4_state(path: Path) -> None:
    save_file(gpt_oss.export_state(MXFP4, prefix=f"{NAME}."), path)


WRITE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "custom": (".onnx", lambda path: custom.write(path, {NAME: DROPLESS})),
    "dense": (".onnx", lambda path: dense.write(path, {"a": DROPLESS, "b": MIXTRAL})),
    "microsoft": (".onnx", lambda path: microsoft.write(path, {NAME: MIXTRAL})),
    "qmoe": (".onnx", lambda path: microsoft.write(path, {NAME: MXFP4})),
    "openvino": (".xml", lambda path: openvino.write(path, {NAME: GPT_OSS})),
    "openvino_experts": (".xml", lambda path: openvino.write(path, {NAME: MIXTRAL.experts.tree()})),
    "infmoe": (".npz", _infmoe),
    "dropless": (".safetensors", _state(DROPLESS, torch.DROPLESS)),
    "gpt_oss": (".safetensors", _state(GPT_OSS, torch.GPT_OSS)),
    "gpt_oss_mxfp4": (".safetensors", _mxfp4_state),
    "mixtral": (".safetensors", _state(MIXTRAL, torch.MIXTRAL)),
    "mixtral_checkpoint": (".safetensors", _state(MIXTRAL, torch.MIXTRAL_CHECKPOINT)),
}
"""Suffix and writer of each file by its name."""


def write_file(folder: Path, name: str) -> Path:
    """Writes one of the files."""
    suffix, write = WRITE[name]
    path = folder / f"{name}{suffix}"
    write(path)
    return path


def needed(path: Path) -> list[str]:
    """The options without which a file is not read."""
    if path.suffix == ".safetensors":
        return ["--experts-per-token", "2"]
    return ["--norm", "rms"] if path.suffix == ".npz" else []

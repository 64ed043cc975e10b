"""Layers in files of OpenVINO's intermediate representation: NAME.xml, and NAME.bin beside it."""

import os
from collections.abc import Mapping
from pathlib import Path

from flax import nnx

from moe_jax.experts.base import Expert
from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.package import load_openvino
from moe_jax.layer import MoE


def write(
    path: str | os.PathLike[str],
    layers: MoE | Expert | Mapping[str, MoE | Expert] | nnx.Module,
) -> None:
    """Writes layers by name as one graph that OpenVINO fuses; see `model.to_model`.

    A layer is an `MoE`, or experts alone. Experts are `GptOssMLP` or `GatedMLP` without biases, of
    float32, float16 or bfloat16 weights, which are kept as they are. What does not change the
    result (`algorithm`, `sharding`) is not written.

    Raises:
        FormatError: the path does not end in .xml, or the graph cannot say a layer.
        ImportError: the package openvino is not installed.
    """
    ov = load_openvino()
    from moe_jax.formats.openvino.model import to_model

    ov.save_model(to_model(layers), _xml(path), compress_to_fp16=False)


def read(path: str | os.PathLike[str]) -> dict[str, MoE | Expert]:
    """The layers of a file that `write` wrote, bit for bit.

    Experts whose gate and linear rows lay in halves come back with them in turn.

    Raises:
        FormatError: the path does not end in .xml, or it is another kind of graph.
        FileNotFoundError: there is no such file.
        ImportError: the package openvino is not installed.
    """
    ov = load_openvino()
    from moe_jax.formats.openvino.model import from_model

    name = _xml(path)
    if not Path(name).exists():
        raise FileNotFoundError(f"no file {name}")
    try:
        model = ov.Core().read_model(name)
    except RuntimeError as error:
        raise FormatError(f"OpenVINO cannot read {name}: {error}") from error
    return from_model(model)


def _xml(path: str | os.PathLike[str]) -> str:
    if Path(path).suffix != ".xml":
        raise FormatError(f"expected a file NAME.xml (its NAME.bin lies beside it), got {path}")
    return os.fspath(path)

"""Files to read: what layers they hold, and one layer after the other."""

import dataclasses
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.command_line.layers import describe_experts, describe_layer
from moe_jax.command_line.options import (
    READ,
    SUFFIXES,
    ReadOptions,
    UsageError,
    check_applies,
)
from moe_jax.command_line.states import States
from moe_jax.command_line.summary import Summary
from moe_jax.formats.errors import FormatError
from moe_jax.layer import MoE

_INFMOE = "infmoe"
ATTRIBUTES_SUFFIX = ".plugin.npz"
"""Ends the name of the file with InfMoE's attributes, beside NAME.npz."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file's layers.

    Attributes:
        format: the format, or several.
        names: the layers' names.
        read: a layer by name: a `MoE`, or experts without a router.
        describe: what is told of a layer by name.
    """

    format: str
    names: tuple[str, ...]
    read: Callable[[str], Any]
    describe: Callable[[str], Summary]


def open_source(path: Path, options: ReadOptions) -> Source:
    """The layers of a file or folder, whatever it is.

    Raises:
        OSError, ValueError, ImportError: it cannot be read; the message says why.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    name = _format_of(path, options)
    check_applies(options, READ, name)
    if options.target is not None and name != "onnx-microsoft":
        raise UsageError(f"--target is for onnx-microsoft, and has no meaning for {name}")
    if name.startswith("torch:"):
        found = States.open(path, options)
        return Source(found.formats, tuple(found.places), found.read, found.describe)
    if name == _INFMOE:
        return _infmoe(path, options)
    return _whole(path, name, options)


def microsoft_target(name: str | None) -> Any:
    """The runtime that `--target` names."""
    from moe_jax.formats.onnx import microsoft

    return {"cpu": microsoft.CPU, "cuda": microsoft.CUDA}[name or "cpu"]


def read_all(path: Path, name: str, target: str | None = None) -> dict[str, Any]:
    """The layers of an ONNX or OpenVINO file."""
    if name == "openvino":
        from moe_jax.formats import openvino

        return dict(openvino.read(path))
    from moe_jax.formats.onnx import custom, dense, microsoft

    if name == "onnx-microsoft":
        return dict(microsoft.read(path, target=microsoft_target(target)))
    return dict({"onnx-custom": custom.read, "onnx-dense": dense.read}[name](path))


def _format_of(path: Path, options: ReadOptions) -> str:
    """The format of a source. Raises UsageError where it cannot be told."""
    if not path.is_dir() and path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: expected a folder of safetensors or a file {', '.join(SUFFIXES)}"
        )
    possible = SUFFIXES[".safetensors" if path.is_dir() else path.suffix]
    if options.format is not None:
        if options.format not in possible:
            raise UsageError(f"{path} is one of {', '.join(possible)}, not {options.format}")
        return options.format
    return possible[0] if path.suffix != ".onnx" or path.is_dir() else _onnx_format(path)


def _onnx_format(path: Path) -> str:
    """What the nodes of an ONNX file are."""
    from moe_jax.formats.onnx import custom, graph, microsoft_schema, writer

    model = graph.load(path)
    microsoft = microsoft_schema.MOE, microsoft_schema.QMOE
    found = {
        "onnx-custom": any(graph.find(model, custom.DOMAIN, custom.OPERATOR)),
        "onnx-microsoft": any(graph.find(model, microsoft_schema.DOMAIN, *microsoft)),
        "onnx-dense": any(n.get("kind") == "dense" for n in writer.read_notes(model).values()),
    }
    names = [name for name, is_there in found.items() if is_there]
    if not names:
        raise UsageError(
            f"{path} holds no MoE layer: no node CustomMoE, MoE or QMoE, and no notes of moe_jax"
        )
    if len(names) > 1:
        raise UsageError(f"{path} holds layers as {' and as '.join(names)}: say which with --from")
    return names[0]


def _whole(path: Path, name: str, options: ReadOptions) -> Source:
    """A file that is read at once."""
    try:
        layers = read_all(path, name, options.target)
    except FormatError:
        if name != "onnx-microsoft":
            raise
        return _experts_alone(path, options)

    def describe(layer: str) -> Summary:
        one = layers[layer]
        tell = describe_layer if isinstance(one, MoE) else describe_experts
        return tell(layer, name, one)

    return Source(name, tuple(layers), layers.__getitem__, describe)


def _experts_alone(path: Path, options: ReadOptions) -> Source:
    """MoE and QMoE nodes whose logits are made in a way that cannot be read."""
    from moe_jax.formats.onnx import microsoft

    nodes = microsoft.read_experts(path, target=microsoft_target(options.target))

    def read(name: str) -> MoE:
        return microsoft.read(path, target=microsoft_target(options.target))[name]

    def describe(name: str) -> Summary:
        one = nodes[name]
        return describe_experts(
            name, "onnx-microsoft", one.experts, experts_per_token=one.experts_per_token
        )

    return Source("onnx-microsoft", tuple(nodes), read, describe)


def _infmoe(path: Path, options: ReadOptions) -> Source:
    name = path.name.removesuffix(path.suffix)

    def read(_: str) -> MoE:
        return read_infmoe(path, options)

    return Source(_INFMOE, (name,), read, functools.partial(_describe_infmoe, path, options))


def read_infmoe(path: Path, options: ReadOptions) -> MoE:
    """The layer of an npz file and its attributes."""
    from moe_jax.formats import infmoe
    from moe_jax.formats.infmoe.attributes_file import read_attributes

    norms = {"rms": infmoe.DESCRIBED_NORM, "layer": infmoe.KERNEL_NORM}
    if options.norm is None:
        raise UsageError(
            f"{path} does not say its norm: give --norm rms, as InfMoE describes it, or "
            f"--norm layer, as it computes it"
        )
    file = options.attributes or path.with_suffix(ATTRIBUTES_SUFFIX)
    if not file.exists():
        raise UsageError(
            f"{path} holds the experts alone, and there is no {file}: name the file with the "
            f"plugin's attributes with --attributes (see infmoe.write_attributes)"
        )
    plugin = dataclasses.replace(read_attributes(file), expert_weight_file=str(path))
    return infmoe.read_layer(plugin, norm=norms[options.norm])


def _describe_infmoe(path: Path, options: ReadOptions, name: str) -> Summary:
    """By the headers of the arrays. Raises FormatError where they are not those of experts."""
    arrays = _npz_headers(path)
    experts = {key.partition("/")[0] for key in arrays}
    if not experts or experts != {str(n) for n in range(len(experts))}:
        raise FormatError(
            f"{path} is no weight file of InfMoE: expected arrays `n/...` for experts 0, 1, ..., "
            f"got {sorted(arrays)[:4]}"
        )
    shape = arrays["0/wi_0_weight"][0] if "0/wi_0_weight" in arrays else (None, None)
    if len(shape) != 2:
        raise FormatError(f"{path}: 0/wi_0_weight must be [hidden_size, d], got {list(shape)}")
    inner, hidden = shape
    return Summary(
        name=name,
        format=_INFMOE,
        experts="T5FeedForward",
        num_experts=len(experts),
        hidden_size=hidden,
        intermediate_size=inner,
        experts_per_token=1,
        activation="geglu_tanh",
        weights=" + ".join(sorted({dtype.name for _, dtype in arrays.values()})),
        nbytes=sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays.values()),
        tensors={key: f"{dtype.name}{list(shape)}" for key, (shape, dtype) in arrays.items()},
    )


def _npz_headers(path: Path) -> dict[str, tuple[Any, np.dtype]]:
    """Shape and dtype of each array, without the arrays."""
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, _, dtype = read(file)
                headers[name.removesuffix(".npy")] = shape, dtype
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise FormatError(f"{path} is not an npz file of plain arrays: {error}") from error
    return headers

"""The names of formats, and which options belong to which; imported by the parser, so light."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

LAYOUTS = ("dropless", "gpt-oss", "gpt-oss-mxfp4", "mixtral", "mixtral-checkpoint")
"""The layouts of safetensors files."""

FORMATS = (
    "onnx-custom",
    "onnx-dense",
    "onnx-microsoft",
    "openvino",
    "infmoe",
    *(f"torch:{layout}" for layout in LAYOUTS),
)
"""What `--from` and `--to` take."""

MODES = ("custom", "dense", "microsoft")
"""The formats of ONNX, without their `onnx-`."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    ".onnx": tuple(f"onnx-{mode}" for mode in MODES),
    ".xml": ("openvino",),
    ".npz": ("infmoe",),
    ".safetensors": tuple(f"torch:{layout}" for layout in LAYOUTS),
}
"""The formats that a file may have, by its suffix."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what can."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What a source does not say by itself; None where it was not given.

    Attributes:
        format: one of `FORMATS`.
        experts_per_token: of safetensors; by default that of the config.json beside them.
        norm: `rms` or `layer`, of InfMoE.
        attributes: the file with the plugin's attributes, of InfMoE; by default beside the source.
        target: `cpu` or `cuda`: the runtime whose reading of onnx-microsoft holds.
    """

    format: str | None = None
    experts_per_token: int | None = None
    norm: str | None = None
    attributes: Path | None = None
    target: str | None = None


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """How a target is written; None where it was not given.

    Attributes:
        dtype: what ONNX computes in, `float32` or `float16`.
        target: `cpu` or `cuda`: the runtime that onnx-microsoft is for.
        definition: whether onnx-custom carries the operator in terms of standard ones.
        external_data: whether the constants of ONNX go to a file beside it.
    """

    dtype: str | None = None
    target: str | None = None
    definition: bool | None = None
    external_data: bool | None = None


READ: Mapping[str, str] = {
    "experts_per_token": "torch:",
    "norm": "infmoe",
    "attributes": "infmoe",
}
WRITE: Mapping[str, str] = {
    "dtype": "onnx-",
    "definition": "onnx-custom",
    "external_data": "onnx-",
}
"""What the name of a format begins with for an option to have a meaning."""


def check_applies(options: ReadOptions | WriteOptions, table: Mapping[str, str], name: str) -> None:
    """Raises UsageError where an option was given that the format `name` has no use for."""
    for option, start in table.items():
        if getattr(options, option) is not None and not name.startswith(start):
            flag = option.replace("_", "-")
            raise UsageError(f"--{flag} is for {start}*, and has no meaning for {name}")


def format_of_target(path: Path, given: str | None) -> str:
    """The format to write. Raises UsageError unless suffix and `--to` settle it."""
    possible = SUFFIXES.get(path.suffix)
    if possible is None:
        raise UsageError(
            f"{path}: the target must end in one of {', '.join(SUFFIXES)}, got {path.suffix!r}"
        )
    if given is None and len(possible) > 1:
        raise UsageError(f"{path} may be one of {', '.join(possible)}: say which with --to")
    if given is not None and given not in possible:
        raise UsageError(f"{path}: a {path.suffix} file is {' or '.join(possible)}, not {given}")
    return next(iter(possible)) if given is None else given

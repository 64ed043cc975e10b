"""The plugin's attributes in a file: an npz file with an array for each, under its own name.

InfMoE itself has none: there the attributes are given where the network is built. Text and numbers
are arrays without axes; `expert_weight_file` is a path relative to the file.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.formats.infmoe.npz import damage_named, open_npz
from moe_jax.formats.infmoe.plugin import InfMoEPlugin

_FIELDS = {field.name: field for field in dataclasses.fields(InfMoEPlugin)}


def read_attributes(path: str | os.PathLike[str]) -> InfMoEPlugin:
    """The attributes in a file that `write_attributes` wrote.

    Raises:
        FormatError: it is another kind of file, or an attribute is missing or wrong.
        FileNotFoundError: there is no such file.
    """
    path = os.fspath(path)
    with open_npz(path) as file, damage_named(path):
        arrays = {name: file[name] for name in file.files}
    needed = {n for n, f in _FIELDS.items() if f.default is dataclasses.MISSING}
    missing, unknown = sorted(needed - set(arrays)), sorted(set(arrays) - set(_FIELDS))
    if missing or unknown:
        raise FormatError(
            f"{path} does not hold the attributes of InfMoE: missing are {missing}, not known are "
            f"{unknown[:8]}"
        )
    attributes: dict[str, Any] = {n: a if a.ndim else a.item() for n, a in arrays.items()}
    file_name = attributes["expert_weight_file"]
    if not isinstance(file_name, str):
        raise FormatError(f"{path}: expert_weight_file must be text, got {file_name!r}")
    attributes["expert_weight_file"] = os.fspath(Path(path).parent / file_name)
    return InfMoEPlugin(**attributes)


def write_attributes(plugin: InfMoEPlugin, path: str | os.PathLike[str]) -> None:
    """Writes the attributes; `expert_weight_file` as the way to it from the file."""
    attributes = {name: getattr(plugin, name) for name in _FIELDS}
    way = os.path.relpath(plugin.expert_weight_file, Path(path).parent)
    attributes["expert_weight_file"] = Path(way).as_posix()
    given: dict[str, Any] = {n: np.asarray(a) for n, a in attributes.items() if a is not None}
    with open(path, "wb") as file:
        np.savez(file, **given)

"""Safetensors checkpoints: what a folder holds, and the slices of it that are asked for.

A checkpoint is a folder with one `model.safetensors`, or with shards and the index that names
them. `Checkpoint.open` reads headers only, and takes names, dtypes and shapes from them; the index
must then agree in every tensor. `Checkpoint.read` reads the bytes of the asked slices into an array
of its own. Files are not mapped into memory: mapped pages would count as the process's memory for
as long as they stay mapped, and a file cut short meanwhile would end the process by a signal.

Every fault of the files is a `CheckpointError` that names the file and, where there is one, the
tensor.
"""

import dataclasses
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.safetensors_file import (
    CheckpointError,
    TensorEntry,
    file_version,
    open_file,
    read_exactly,
    read_header,
    read_json,
)

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "TensorEntry",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ALIGNMENT = 64  # what JAX's CPU backend needs to take over a NumPy array without a copy


class ConfigError(ValueError):
    """A configuration has a missing, mistyped or unsupported value."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a safetensors folder. Make one with `Checkpoint.open`.

    Attributes:
        folder: the folder.
        tensors: every tensor by name.
    """

    folder: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Checkpoint":
        """Reads the index and the headers of all files.

        Raises CheckpointError where a file is missing, unreadable, not a regular file or damaged,
        where index and headers disagree, and where both a single file and an index are there.
        """
        folder = Path(folder)
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if os.path.lexists(single) and os.path.lexists(index):
            raise CheckpointError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the one not meant"
            )
        if os.path.lexists(single):
            return cls(folder, read_header(single))
        if os.path.lexists(index):
            return cls(folder, _read_shards(folder, _read_index(index)))
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Reads a tensor, or the box of it that `index` cuts out, and no other byte.

        Args:
            name: the tensor's name.
            index: one slice of step 1 for each axis; axes not given are read whole.

        Raises:
            CheckpointError: no such tensor, or the file changed since its header was read.
            ValueError: too many slices, or steps other than 1.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        entry = self.tensors[name]
        starts, sizes = _box(entry, index)
        array = _aligned_empty(sizes, entry.dtype)
        with open_file(entry.path) as file:
            _read_box(file, entry, starts, array)
            unchanged = file_version(file) == entry.version
        if not unchanged:
            raise CheckpointError(f"{entry.path}, tensor {name}: the file changed while loading")
        return array


def _box(entry: TensorEntry, index: Sequence[slice]) -> tuple[list[int], list[int]]:
    """The first index and the size of the box along each axis."""
    if len(index) > len(entry.shape):
        raise ValueError(f"{len(index)} slices for tensor {entry.name} of shape {entry.shape}")
    starts, sizes = [0] * len(entry.shape), list(entry.shape)
    for axis, cut in enumerate(index):
        start, stop, step = cut.indices(entry.shape[axis])
        if step != 1:
            raise ValueError(f"slices of {entry.name} must have step 1, got {cut}")
        starts[axis], sizes[axis] = start, max(stop - start, 0)
    return starts, sizes


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % _ALIGNMENT
    return buffer[first : first + nbytes].view(dtype).reshape(shape)


def _read_box(file: io.FileIO, entry: TensorEntry, starts: list[int], array: np.ndarray) -> None:
    """Fills `array` with the box of its shape at `starts`, one read for each run of bytes.

    A run covers the last axis that is cut and all axes after it.
    """
    if not array.size:
        return
    strides = [math.prod(entry.shape[n + 1 :]) for n in range(len(entry.shape))]
    cut = [n for n, size in enumerate(entry.shape) if array.shape[n] != size]
    outer = cut[-1] if cut else 0
    first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    target = memoryview(array.reshape(-1).view(np.uint8))
    length = target.nbytes // math.prod(array.shape[:outer])
    for run, indices in enumerate(itertools.product(*map(range, array.shape[:outer]))):
        place = first + sum(i * s for i, s in zip(indices, strides, strict=False))
        part = target[run * length : (run + 1) * length]
        read_exactly(file, entry.offset + place * entry.dtype.itemsize, part)


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    """The headers of all shards, once they agree with the index's tensor -> shard map."""
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                told = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(
                    f"{entry.path} holds {name}, which {INDEX_FILE} says is {told}"
                )
            tensors[name] = entry
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder / weight_map[absent[0]]} lacks {absent[0]}, which {INDEX_FILE} says it holds"
            f"{_more(absent[1:])}"
        )
    return tensors


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names)} more such tensors)" if names else ""


def _read_index(path: Path) -> dict[str, str]:
    """The tensor -> shard file map of an index file."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object with a non-empty object weight_map")
    for name, shard in weight_map.items():
        if not _is_shard_name(shard):
            raise CheckpointError(
                f"{path}, tensor {name}: expected a plain file name ending in .safetensors, "
                f"got {shard!r:.200}"
            )
    return weight_map


def _is_shard_name(name: Any) -> bool:
    """Whether `name` can only name a file directly in the checkpoint's folder.

    The name is what is checked and not where it leads: download caches are made of symbolic links.
    """
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name != ".safetensors"
        and not any(character in name for character in "/\\:\0")
    )

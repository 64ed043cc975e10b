"""One safetensors file: where its tensors lie, after every check of its header.

Checked are the lengths, the JSON (keys must be unique, which the safetensors library does not ask
for), the fields of every tensor, that data offsets agree with dtypes and shapes, and that the
tensors cover the file without gap or overlap. Every fault is a `CheckpointError` that names the
file and, where there is one, the tensor.

Source: the format's description at https://github.com/huggingface/safetensors#format.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit on a header

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The dtypes that can be read, by their names in safetensors headers."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or do not hold what was expected of them."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: its name in the checkpoint.
        path: the file that holds it.
        dtype: the dtype of its elements.
        shape: its shape.
        offset: its first byte's place in the file.
        version: what identifies the file as the one whose header was read.
    """

    name: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    version: tuple[int, ...] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype's name in safetensors headers, such as "BF16"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name. Raises CheckpointError for any fault of its header."""
    with open_file(path) as file:
        version = file_version(file)
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{path}: {size} bytes are too few for a header")
        length, limit = int.from_bytes(_read_bytes(file, 0, 8), "little"), size - 8
        limit = min(limit, _MAX_JSON_BYTES)
        if length > limit:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes, expected at most {limit}"
            )
        header = _parse_json(_read_bytes(file, 8, length), path)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be an object, not {type(header).__name__}")
    _check_metadata(path, header.pop("__metadata__", {}))
    entries = [_entry(path, name, fields, 8 + length, version) for name, fields in header.items()]
    _check_cover(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _entry(
    path: Path, name: str, fields: Any, data_start: int, version: tuple[int, ...]
) -> TensorEntry:
    """One tensor's entry. Raises CheckpointError unless dtype, shape and offsets agree."""

    def wrong(expected: str, got: Any) -> CheckpointError:
        return CheckpointError(f"{path}, tensor {name}: expected {expected}, got {got!r:.200}")

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise wrong("an object with dtype, shape and data_offsets", fields)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise wrong(f"a dtype among {', '.join(DTYPES)}", fields["dtype"])
    if not _are_sizes(fields["shape"]):
        raise wrong("a shape of integers from 0 on", fields["shape"])
    offsets = fields["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets [first, end] from 0 on", offsets)
    dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
    entry = TensorEntry(name, path, dtype, shape, data_start + offsets[0], version)
    if entry.nbytes != offsets[1] - offsets[0]:
        raise wrong(
            f"data_offsets {entry.nbytes} bytes apart for {fields['dtype']} {shape}", offsets
        )
    return entry


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")


def _check_cover(path: Path, entries: list[TensorEntry], start: int, end: int) -> None:
    """Raises CheckpointError unless tensors follow each other without gap from start to end."""
    place = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != place:
            kind = "overlaps the tensor before it" if entry.offset < place else "follows a gap"
            raise CheckpointError(f"{path}, tensor {entry.name}: its data {kind}")
        place += entry.nbytes
    if place != end:
        raise CheckpointError(
            f"{path}: the header describes a file of {place} bytes, it has {end}: "
            f"the file is {'truncated' if end < place else 'too long'}, download it again"
        )


def _parse_json(data: bytes, path: Path) -> Any:
    """Parses UTF-8 JSON. Raises CheckpointError for anything else, and for repeated keys."""
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {str(error):.200}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"repeated key {repeated!r:.200}")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[io.FileIO]:
    """Opens a regular file for reading; an OSError inside becomes a CheckpointError with its path.

    What symbolic links lead to is opened. Pipes and devices are refused before they are opened,
    since opening a pipe waits for its other end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def file_version(file: io.FileIO) -> tuple[int, ...]:
    """What changes when a file is replaced, cut, grown or written to."""
    info = os.fstat(file.fileno())
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def read_exactly(file: io.FileIO, offset: int, target: memoryview) -> None:
    """Fills `target` from an unbuffered file. Raises OSError where the file ends too early."""
    file.seek(offset)
    done = 0
    while done < target.nbytes:
        count = file.readinto(target[done:])
        if not count:
            raise OSError("the file ends before its tensors do: it changed while loading")
        done += count


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises CheckpointError where it is not one."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {_MAX_JSON_BYTES}")
        return _parse_json(_read_bytes(file, 0, size), path)


def _read_bytes(file: io.FileIO, offset: int, count: int) -> bytes:
    data = bytearray(count)
    read_exactly(file, offset, memoryview(data))
    return bytes(data)

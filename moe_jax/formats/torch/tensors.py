"""Tensors of safetensors files and of PyTorch as NumPy arrays, and back.

PyTorch is imported by `to_torch` alone.
"""

import importlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.checkpoint import Checkpoint
from moe_jax.formats.errors import FormatError
from moe_jax.safetensors_file import open_file, read_exactly, read_header


def tensor_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors in a safetensors file or folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = Path(path)
    return list(Checkpoint.open(path).tensors if path.is_dir() else read_header(path))


def load_tensors(path: str | os.PathLike[str], prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors whose names begin with `prefix`, from a safetensors file or folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        folder = Checkpoint.open(path)
        return {name: folder.read(name) for name in folder.tensors if name.startswith(prefix)}
    tensors = {}
    entries = read_header(path)
    with open_file(path) as file:
        for name, entry in entries.items():
            if name.startswith(prefix):
                tensors[name] = np.empty(entry.shape, entry.dtype)
                target = tensors[name].reshape(-1).view(np.uint8)
                read_exactly(file, entry.offset, memoryview(target))
    return tensors


def named_below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose names begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def check_names(own: Collection[str], expected: Collection[str], prefix: str) -> None:
    """Raises FormatError unless a layer has tensors of the expected names and no others.

    Args:
        own: the names that begin with `prefix`, without it.
        expected: the names of a layer, likewise.
        prefix: for the message.
    """
    missing, unknown = sorted(set(expected) - set(own)), sorted(set(own) - set(expected))
    if missing or unknown:
        raise FormatError(
            f"the tensors {prefix}* are not those of the layout: missing are {missing[:8]}, "
            f"not known are {unknown[:8]}"
        )


def to_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A state dict as PyTorch tensors, for `load_state_dict`.

    Raises:
        ImportError: PyTorch is not installed.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError("to_torch makes PyTorch tensors: pip install torch") from error

    def one(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {name: one(array) for name, array in state.items()}


def to_numpy(tensor: Any) -> np.ndarray:
    """A PyTorch tensor, or anything that NumPy takes, as an array with the same bits."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds all its numbers
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()

"""npz files of plain arrays, opened so that damage is a `FormatError`."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from moe_jax.formats.errors import FormatError


@contextlib.contextmanager
def open_npz(path: str) -> Iterator[np.lib.npyio.NpzFile]:
    """An npz file, nothing of which is unpickled; read its arrays inside `damage_named`.

    Raises:
        FormatError: it is another kind of file.
        FileNotFoundError: there is no such file.
    """
    # opened here, for NumPy leaves what it opened open where it is damaged
    with open(path, "rb") as opened:
        with damage_named(path):
            file = np.load(opened, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise FormatError(f"{path} holds a single array, expected an npz file")
        with file:
            yield file


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What NumPy raises for a file that it cannot read, as a FormatError."""
    try:
        yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path} is not an npz file of plain arrays: {error}") from error

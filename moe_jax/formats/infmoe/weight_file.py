"""The weight file: an npz file with an array for each expert and parameter."""

from collections.abc import Iterable

import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.formats.infmoe.npz import damage_named, open_npz
from moe_jax.formats.infmoe.plugin import InfMoEPlugin, check_array
from moe_jax.formats.infmoe.sublayers import Sublayer

_MOST_LISTED = 12


def read_arrays(plugin: InfMoEPlugin, sublayer: Sublayer) -> dict[str, np.ndarray]:
    """Float32 arrays [expert, ...] by key, of the file of `plugin`.

    Raises:
        FormatError: it is no npz file, lacks keys or has others, or an array does not fit.
        FileNotFoundError: there is no such file.
    """
    path = plugin.expert_weight_file
    with open_npz(path) as file:
        keys = _check_keys(path, set(file.files), plugin, sublayer)
        shapes = sublayer.shapes(plugin.embedding_size, plugin.hidden_size)
        arrays = {}
        for key in keys:
            arrays[key] = np.empty((plugin.expert_count, *shapes[key]), np.float32)
            for n in range(plugin.expert_count):
                with damage_named(path):
                    array = file[f"{n}/{key}"]
                check_array(f"{n}/{key} in {path}", array, shapes[key])
                arrays[key][n] = array
    return arrays


def write_arrays(plugin: InfMoEPlugin, sublayer: Sublayer, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays [expert, ...] by key.

    Raises:
        FormatError: one does not have the shape that the attributes say; nothing is written then.
    """
    shapes = sublayer.shapes(plugin.embedding_size, plugin.hidden_size)
    for key, array in arrays.items():
        check_array(key, array, (plugin.expert_count, *shapes[key]))
    parts = {f"{n}/{key}": part for key, array in arrays.items() for n, part in enumerate(array)}
    with open(plugin.expert_weight_file, "wb") as file:
        np.savez(file, **parts)


def _check_keys(path: str, found: set[str], plugin: InfMoEPlugin, sublayer: Sublayer) -> list[str]:
    """The keys that each expert has in the file. An optional one is there for all or for none."""
    count = range(plugin.expert_count)
    keys = [
        key
        for key in sublayer.shapes(plugin.embedding_size, plugin.hidden_size)
        if key not in sublayer.optional or any(f"{n}/{key}" in found for n in count)
    ]
    expected = {f"{n}/{key}" for n in count for key in keys}
    if found != expected:
        raise FormatError(
            f"{path} does not hold what {plugin.expert_count} experts of type "
            f"{plugin.expert_sublayer_type} need: missing {_listed(expected - found)}; "
            f"unexpected {_listed(found - expected)}"
        )
    return keys


def _listed(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    shown = [*ordered[:_MOST_LISTED], *(["..."] if len(ordered) > _MOST_LISTED else [])]
    return ", ".join(shown) or "none"

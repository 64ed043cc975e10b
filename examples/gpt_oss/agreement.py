"""What processes that run one model together must have in common.

A process that has another prompt, model or flag starts other programs than the rest, which then
wait for it forever or compute nonsense. So all compare what they have before a model is loaded, and
where clock or chance decides, the first process does.
"""

import argparse
import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_oss.errors import UserError
from gpt_oss.source import Source

_OWN = {
    *("model", "revision", "offline", "coordinator", "process_id", "compile_cache"),
    *("no_progress", "json", "show_reasoning"),
}
"""Flags in which processes may differ: what `--model` leads to is compared instead."""

_SHOWN = 60


def agreed(number: int) -> int:
    """The number, at least 0 and below 2**63, that the first process has."""
    if jax.process_count() == 1:
        return number
    halves = np.asarray([number >> 32, number & 0xFFFFFFFF], np.uint32)
    high, low = (int(half) for half in multihost_utils.broadcast_one_to_all(halves))
    return high << 32 | low


def check_same(values: Mapping[str, str]) -> None:
    """Compares texts, of the same names everywhere, with those of the other processes.

    Raises:
        UserError: in every process, where any has another text; says what is here.
    """
    hashes = np.stack([_hash(value) for value in values.values()])
    everyones = np.asarray(multihost_utils.process_allgather(hashes))
    same = (everyones == everyones[0]).all(axis=(0, 2))
    here = [
        f"{name} {_short(value)}"
        for (name, value), equal in zip(values.items(), same, strict=True)
        if not equal
    ]
    if here:
        raise UserError(
            f"the processes differ; process {jax.process_index()} has {', '.join(here)}: run the "
            f"same command with the same model in each"
        )


def common(arguments: argparse.Namespace, source: Source) -> dict[str, str]:
    """What must be the same in all processes: the flags and the model's files.

    Flags, tokenizer and date make the ids of the prompt, so that these are the same as well. Of
    weights, which may be large, names and sizes are taken.
    """
    flags = {
        "--" + name.replace("_", "-"): str(value)
        for name, value in vars(arguments).items()
        if name not in _OWN
    }
    texts = {name: _content(source, name) for name in ("config.json", "tokenizer.json")}
    shards = sorted(source.folder.glob("*.safetensors"))
    weights = " ".join(f"{path.name}:{path.stat().st_size}" for path in shards)
    return {**flags, "the model": source.name, **texts, "the weights": weights}


def _content(source: Source, name: str) -> str:
    """A short text for a file's content; where it is missing, loading says so."""
    path = source.folder / name
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "missing"


def _hash(text: str) -> np.ndarray:
    """uint32 [4]"""
    return np.frombuffer(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16], "<u4")


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")

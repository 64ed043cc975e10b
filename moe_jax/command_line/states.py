"""MoE layers in safetensors: found and described by the headers, read one at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.activations import Activation
from moe_jax.checkpoint import Checkpoint, CheckpointError
from moe_jax.command_line.options import ReadOptions, UsageError
from moe_jax.command_line.summary import Summary
from moe_jax.formats import gpt_oss
from moe_jax.formats import torch as states
from moe_jax.layer import MoE
from moe_jax.quantization.mxfp4 import BLOCK_SIZE
from moe_jax.safetensors_file import TensorEntry, read_header, read_json

_CONFIG = "config.json"
_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """One layout of a layer's tensors.

    Attributes:
        tensors: what each name holds.
        experts: the class of the experts, for people.
        activation: of the experts, unless a config.json says another limit.
        read: (state, experts_per_token, prefix, activation) -> layer.
        write: (layer, prefix) -> state.
    """

    tensors: tuple[states.Tensor, ...]
    experts: str
    activation: Activation
    read: Callable[[Mapping[str, np.ndarray], int, str, Activation], MoE]
    write: Callable[[MoE, str], dict[str, np.ndarray]]

    @property
    def router(self) -> str:
        """The name of the router's weight."""
        return next(part.name for part in self.tensors if part.fields == ("router_weight",))

    def names(self, num_experts: int) -> Iterator[str]:
        """The names of a layer's tensors."""
        for part in self.tensors:
            yield from map(part.name.format, range(num_experts if part.per_expert else 1))


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer in a file.

    Attributes:
        format: the key of its `StateFormat`.
        prefix: of its tensors' names.
        entries: its tensors by name, without the prefix.
    """

    format: str
    prefix: str
    entries: Mapping[str, TensorEntry]


def _of_layout(layout: states.Layout) -> StateFormat:
    def read(
        state: Mapping[str, np.ndarray], count: int, prefix: str, activation: Activation
    ) -> MoE:
        own = dataclasses.replace(layout, activation=activation)
        return states.import_state(state, own, experts_per_token=count, prefix=prefix)

    def write(layer: MoE, prefix: str) -> dict[str, np.ndarray]:
        router = layer.config.router
        alike = router in gpt_oss.ROUTERS and layout.router in gpt_oss.ROUTERS
        own = dataclasses.replace(layout, router=router) if alike else layout
        return states.export_state(layer, own, prefix=prefix)

    return StateFormat(layout.tensors, layout.experts.__name__, layout.activation, read, write)


def _read_gpt_oss(
    state: Mapping[str, np.ndarray], count: int, prefix: str, activation: Activation
) -> MoE:
    return gpt_oss.import_state(
        state, experts_per_token=count, prefix=prefix, activation=activation
    )


def _write_gpt_oss(layer: MoE, prefix: str) -> dict[str, np.ndarray]:
    return gpt_oss.export_state(layer, prefix=prefix)


STATE_FORMATS: Mapping[str, StateFormat] = {
    "torch:dropless": _of_layout(states.DROPLESS),
    "torch:gpt-oss": _of_layout(states.GPT_OSS),
    "torch:gpt-oss-mxfp4": StateFormat(
        gpt_oss.TENSORS,
        "GptOssMLP",
        states.GPT_OSS.activation,
        _read_gpt_oss,
        _write_gpt_oss,
    ),
    "torch:mixtral": _of_layout(states.MIXTRAL),
    "torch:mixtral-checkpoint": _of_layout(states.MIXTRAL_CHECKPOINT),
}


@dataclasses.dataclass(frozen=True)
class States:
    """The layers of a safetensors file or folder; made from its headers alone.

    Attributes:
        path: the file or folder.
        places: where each layer lies, by name, in the order of numbers in the names.
        experts_per_token: as given, or as config.json says; None where neither does.
        limit: `swiglu_limit` of config.json, or None.
    """

    path: Path
    places: Mapping[str, Place]
    experts_per_token: int | None
    limit: float | None

    @classmethod
    def open(cls, path: Path, options: ReadOptions) -> "States":
        """Finds the layers.

        Raises:
            CheckpointError: a file is missing or damaged.
            UsageError: there is no layer in a known layout.
        """
        entries = Checkpoint.open(path).tensors if path.is_dir() else read_header(path)
        wanted = [options.format] if options.format else list(STATE_FORMATS)
        found = {place.prefix: place for name in wanted for place in _places(entries, name)}
        if not found:
            raise UsageError(
                f"{path} holds no MoE layer in the layout {' or '.join(wanted)} "
                f"({len(entries)} tensors, such as {', '.join(sorted(entries)[:3])})"
            )
        names = {prefix.removesuffix(".") or "moe": found[prefix] for prefix in found}
        config = _config(path)
        stated = next((config[key] for key in _PER_TOKEN if type(config.get(key)) is int), None)
        limit = config.get("swiglu_limit")
        return cls(
            path,
            {name: names[name] for name in sorted(names, key=_natural)},
            options.experts_per_token or stated,
            limit if isinstance(limit, float) and limit > 0 else None,
        )

    @property
    def formats(self) -> str:
        """The layouts there are."""
        return ", ".join(sorted({place.format for place in self.places.values()}))

    def read(self, name: str) -> MoE:
        """One layer; no other tensor is read.

        Raises:
            UsageError: nothing says how many experts a token has.
            FormatError: the tensors do not fit each other.
        """
        place = self.places[name]
        if self.experts_per_token is None:
            raise UsageError(
                f"{self.path} does not say how many experts a token has: give --experts-per-token"
            )
        state = states.load_tensors(self.path, place.prefix)
        kind = STATE_FORMATS[place.format]
        return kind.read(state, self.experts_per_token, place.prefix, self._activation(kind))

    def describe(self, name: str) -> Summary:
        """What the headers say of a layer."""
        place = self.places[name]
        kind = STATE_FORMATS[place.format]
        router, last = (_part(kind, place, field) for field in ("router_weight", "down"))
        inner = last[1].get("in") or last[1].get("block", 0) * BLOCK_SIZE
        packed = "block" in last[1]
        return Summary(
            name=name,
            format=place.format,
            experts=kind.experts,
            num_experts=router[1]["expert"],
            hidden_size=router[1]["d"],
            intermediate_size=inner,
            experts_per_token=self.experts_per_token,
            activation=self._activation(kind).kind,
            weights="mxfp4" if packed else last[0].dtype.name,
            nbytes=sum(entry.nbytes for entry in place.entries.values()),
            tensors={n: f"{e.dtype.name}{list(e.shape)}" for n, e in sorted(place.entries.items())},
        )

    def _activation(self, kind: StateFormat) -> Activation:
        if kind.activation.limit is None or self.limit is None:
            return kind.activation
        return dataclasses.replace(kind.activation, limit=self.limit)


def _places(entries: Mapping[str, TensorEntry], name: str) -> Iterator[Place]:
    """The layers in one layout: those routers that all the other tensors go with."""
    kind = STATE_FORMATS[name]
    for key, entry in entries.items():
        prefix = key.removesuffix(kind.router)
        if prefix == key or (prefix and not prefix.endswith(".")) or len(entry.shape) != 2:
            continue
        if entry.shape[0] > len(entries) and any(part.per_expert for part in kind.tensors):
            continue  # which a damaged header may claim
        own = list(kind.names(entry.shape[0]))
        if all(prefix + n in entries for n in own):
            yield Place(name, prefix, {n: entries[prefix + n] for n in own})


def _part(kind: StateFormat, place: Place, field: str) -> tuple[TensorEntry, dict[str, int]]:
    """The tensor of a field, and its sizes by axis."""
    names = (field, f"{field}.blocks")
    part = next(part for part in kind.tensors if part.fields[0] in names)
    entry = place.entries[part.name.format(0)]
    if len(entry.shape) != len(part.axes):
        raise CheckpointError(
            f"{entry.path}, tensor {entry.name}: expected the axes {part.axes}, got the shape "
            f"{entry.shape}"
        )
    return entry, dict(zip(part.axes, entry.shape, strict=True))


def _config(path: Path) -> dict[str, Any]:
    """The fields of the config.json of a checkpoint's folder; none where there is no such file."""
    file = (path if path.is_dir() else path.parent) / _CONFIG
    if not file.is_file():
        return {}
    config = read_json(file)
    return config if isinstance(config, dict) else {}


@functools.cache
def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A key by which `layers.10` follows `layers.9`."""
    parts = name.split(".")
    return tuple((0, int(p)) if p.isdecimal() else (1, p) for p in parts)

"""The least that a step of gpt-oss on a mesh can take: bytes, operations, and what is sent.

All of it is arithmetic on shapes, for one device, which is the mean one where experts are chosen
evenly:

bytes       the device's part of each weight that is needed, once, and of the cache that is seen.
            Of the experts those that some token of the device's part of the `data` axis chooses,
            if all are equally likely: E (1 - (1 - k / E)^tokens) of E, split over their owners.
            Activations, norms and biases are left out.
operations  two for each weight and token, and for scores and values of keys that are seen.
sent        collectives that the program cannot do without: the sums after attention where heads
            are split, and those of the experts or their exchange. The time of each is read off
            what that collective took alone, on so many bytes, in the same report.

A floor is the larger of bytes at the measured bandwidth and operations at the measured rate of a
bfloat16 matmul. With communication, the times of the collectives are added, as if nothing hid them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from gpt_oss.config import GptOssConfig
from moe_jax.sharding.communication import capacity, choose_communication

_SUM_BYTES = 4  # of a number while experts' results are summed
_BITS = 4.25  # of an element of MXFP4, its part of the scale included


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call of the model does.

    Attributes:
        rows: sequences.
        new: tokens of each that it takes.
        start: tokens of each that came before.
    """

    rows: int
    new: int
    start: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that all devices send at a point of the program.

    Attributes:
        kind: psum, all_gather or all_to_all.
        devices: how many take part.
        bytes: of the array on each device: what is summed, what is gathered in the end, or what is
            swapped.
        count: how often.
    """

    kind: str
    devices: int
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True)
class Floors:
    """What a device must do in a step.

    Attributes:
        bytes: to read.
        operations: floating-point operations.
        collectives: to take part in.
    """

    bytes: float
    operations: float
    collectives: tuple[Collective, ...]


def floors(
    config: GptOssConfig,
    sizes: Mapping[str, int],
    step: Step,
    *,
    calls: int = 1,
    bytes_per_float: int = 2,
) -> Floors:
    """What a device of a mesh must do in a step; sizes that are left out are 1.

    Where the step is made of several calls with as many new tokens each, the collectives are those
    of all calls. Bytes are not: one call could read them once.
    """
    mesh = _Mesh(config, *(sizes.get(axis, 1) for axis in ("data", "expert", "model")))
    call = dataclasses.replace(step, new=step.new // calls)
    rows = step.rows / mesh.splitting(step.rows)
    tokens = rows * step.new
    attention = _attention_weights(config) / mesh.model
    head = config.vocab_size * config.hidden_size / mesh.owners
    seen = _keys_seen(config, step)
    cached = sum(min(step.start + step.new, most) for most in _reaches(config, step))
    grouped = mesh.grouped(step)
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * bytes_per_float / mesh.model
    experts = _expert_elements(config)
    chosen = grouped * config.experts_per_token / mesh.owners
    layers, router = config.num_hidden_layers, config.num_experts * config.hidden_size
    return Floors(
        bytes=bytes_per_float * (layers * (attention + router) + head)
        + layers * distinct_experts(config, grouped) / mesh.owners * experts * _BITS / 8
        + rows * cached * kv_bytes,
        operations=2 * (tokens * layers * attention + step.rows / mesh.data * head)
        + 2 * layers * chosen * experts
        + 4 * rows * seen * config.num_attention_heads * config.head_dim / mesh.model,
        collectives=tuple(
            dataclasses.replace(one, count=calls * one.count)
            for one in _collectives(mesh, call, bytes_per_float)
        ),
    )


def distinct_experts(config: GptOssConfig, tokens: float) -> float:
    """How many experts of a layer some token chooses, if all are equally likely."""
    share = config.experts_per_token / config.num_experts
    return config.num_experts * (1 - (1 - share) ** tokens)


def microseconds(
    found: Floors, ceilings: Mapping[str, float], rates: "Rates"
) -> dict[str, float | None]:
    """Times of the three parts, and of the whole without and with communication."""
    memory = found.bytes / max(ceilings["read_TBps"], ceilings["copy_TBps"]) / 1e6
    compute = found.operations / ceilings["bf16_matmul_TFLOPs"] / 1e6
    sent = rates.microseconds(found.collectives)
    least = max(memory, compute)
    return {
        "floor_memory_us": memory,
        "floor_compute_us": compute,
        "floor_communication_us": sent,
        "floor_us": least,
        "floor_with_communication_us": None if sent is None else least + sent,
    }


class Rates:
    """What collectives alone took, from rows of the report."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._times: dict[tuple[str, int], dict[int, float]] = {}
        for row in rows:
            if row["phase"] == "collective":
                key = row["collective"], row["devices"]
                self._times.setdefault(key, {})[row["bytes"]] = row["us"]

    def microseconds(self, collectives: Iterable[Collective]) -> float | None:
        """The time of all of them; None where one was not measured."""
        total = 0.0
        for one in collectives:
            table = self._times.get((one.kind, one.devices))
            if not table:
                return None
            total += one.count * interpolated(table, one.bytes)
        return total


def interpolated(times: Mapping[int, float], size: int) -> float:
    """The time for a size, between those measured on a straight line.

    Below the least size it is that of the least, above the largest it grows with the size.
    """
    known = sorted(times)
    if size <= known[0]:
        return times[known[0]]
    if size >= known[-1]:
        return times[known[-1]] * size / known[-1]
    above = next(n for n in known if n >= size)
    below = known[known.index(above) - 1]
    part = (size - below) / (above - below)
    return times[below] + part * (times[above] - times[below])


@dataclasses.dataclass(frozen=True)
class _Mesh:
    config: GptOssConfig
    data: int
    expert: int
    model: int

    @property
    def owners(self) -> int:
        """Devices over which experts and vocabulary are spread."""
        return self.expert * self.model

    def splitting(self, rows: int) -> int:
        """Over how many devices rows are split outside of the experts, see `Sharding.constrain`."""
        if rows % (self.data * self.expert) == 0:
            return self.data * self.expert
        return self.data if rows % self.data == 0 else 1

    def grouped(self, step: Step) -> int:
        """Tokens that meet the same experts."""
        return -(-step.rows * step.new // self.data)


def _attention_weights(config: GptOssConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * config.head_dim * config.hidden_size


def _expert_elements(config: GptOssConfig) -> int:
    return 3 * config.intermediate_size * config.hidden_size


def _reaches(config: GptOssConfig, step: Step) -> list[int]:
    """The most keys of the cache that each layer needs in a step."""
    windows = (config.window(layer) for layer in range(config.num_hidden_layers))
    end = step.start + step.new
    return [end if window is None else min(window + step.new - 1, end) for window in windows]


def _keys_seen(config: GptOssConfig, step: Step) -> float:
    """Pairs of a new token of one row and a key that it sees, in all layers."""
    total = 0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer) or math.inf
        first, last = step.start + 1, step.start + step.new
        if last <= window:
            total += (first + last) * step.new // 2
        elif first >= window:
            total += int(window) * step.new
        else:
            growing = int(window) - first
            total += (first + int(window) - 1) * growing // 2
            total += int(window) * (step.new - growing)
    return float(total)


def _collectives(mesh: _Mesh, step: Step, bytes_per_float: int) -> Iterable[Collective]:
    """What is sent in all layers; devices have `here` rows outside of the experts."""
    config = mesh.config
    layers, row = config.num_hidden_layers, config.hidden_size * bytes_per_float
    here = step.rows // mesh.splitting(step.rows) * step.new
    if mesh.model > 1:
        yield Collective("psum", mesh.model, here * row, layers)
    grouped, chosen = mesh.grouped(step), config.experts_per_token
    held = grouped
    if mesh.owners > 1 and choose_communication(grouped, mesh.owners, chosen) == "psum":
        if grouped > here:
            yield Collective("all_gather", grouped // here, grouped * row, layers)
        wide = config.hidden_size * max(bytes_per_float, _SUM_BYTES)
        yield Collective("psum", mesh.owners, grouped * wide, layers)
    elif mesh.owners > 1:
        held = -(-grouped // mesh.owners)
        room = mesh.owners * capacity(held, mesh.owners, chosen)
        yield Collective("all_to_all", mesh.owners, room * row, 2 * layers)
        yield Collective("all_to_all", mesh.owners, room * 2 * chosen * 4, layers)
    if here > held:
        yield Collective("all_gather", here // held, here * row, layers)

"""What a trace of `jax.profiler` says of collectives on GPUs, and of what runs meanwhile.

Of each device the kernels on all its streams are taken. The time of a collective is that of its
kernel, and so includes waiting for the other devices. It is hidden where another kernel runs on the
same device at the same time.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

_COLLECTIVE = re.compile(
    r"nccl|all.?reduce|all.?gather|all.?to.?all|reduce.?scatter|collective.?permute|p2p", re.I
)

type Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class DeviceTimes:
    """Microseconds of one device in a trace.

    Attributes:
        device: its name.
        span: from the first kernel's begin to the last one's end.
        collectives: in which some collective ran.
        kernels: in which some other kernel ran.
        overlap: in which both ran.
        longest: names of the kernels that took most, and their microseconds.
    """

    device: str
    span: float
    collectives: float
    kernels: float
    overlap: float
    longest: dict[str, float]

    @property
    def idle(self) -> float:
        """Microseconds in which nothing ran."""
        return self.span - (self.collectives + self.kernels - self.overlap)


def trace(folder: Path, function: Callable[[], Any]) -> list[DeviceTimes]:
    """Calls `function` under the profiler, which leaves its files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(function())
    planes: list[Any] = []
    for path in sorted(set(folder.rglob("*.xplane.pb")) - before):
        planes += jax.profiler.ProfileData.from_file(str(path)).planes
    return device_times(planes)


def device_times(planes: Iterable[Any]) -> list[DeviceTimes]:
    """The times of each GPU among the planes of a trace, by name."""
    found = []
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        # other lines are made of these: the same time by operation or by module
        lines = [line for line in plane.lines if line.name.startswith("Stream")]
        events = [
            (event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
            for line in lines
            for event in line.events
        ]
        if events:
            found.append(_of_device(plane.name, events))
    return sorted(found, key=lambda times: times.device)


def _of_device(name: str, events: list[tuple[str, float, float]]) -> DeviceTimes:
    collectives, kernels = [], []
    longest: dict[str, float] = {}
    for event, start, duration in events:
        (collectives if _COLLECTIVE.search(event) else kernels).append((start, start + duration))
        longest[event] = longest.get(event, 0.0) + duration
    everything = union(collectives + kernels)
    both = length(union(collectives)) + length(union(kernels)) - length(everything)
    ranked = sorted(longest.items(), key=lambda item: -item[1])[:8]
    return DeviceTimes(
        name,
        everything[-1][1] - everything[0][0],
        length(union(collectives)),
        length(union(kernels)),
        both,
        dict(ranked),
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals that cover the same and do not touch, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """The sum of their lengths."""
    return sum(end - start for start, end in intervals)


def table(what: str, times: Iterable[DeviceTimes]) -> str:
    """Lines of text, one for each device."""
    lines = [
        f"  {what} {t.device}: {t.span:.0f} us; kernels {t.kernels:.0f}, collectives "
        f"{t.collectives:.0f}, of which hidden {t.overlap:.0f}; idle {t.idle:.0f}"
        for t in times
    ]
    return "\n".join(lines) or f"  {what}: the trace has no kernels of GPUs"

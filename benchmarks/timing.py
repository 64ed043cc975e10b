"""How the benchmarks sample times; nothing here needs JAX or torch.

What is timed is a `Run`: it does something `count` times without waiting in between, waits once at
the end, and says how many seconds the device took. A sample is one such run, long enough that the
wait at its end, and that for the host at its beginning, do not matter. Contenders are sampled in
turns, so that a drift of the clocks meets all of them.
"""

import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping

# plain assignments: the interpreter of a peer may be older than ours
Run = Callable[[int], float]
"""Does the work `count` times and returns the seconds that took in all."""

Sampler = Callable[[int], list[float]]
"""Takes so many samples, in microseconds."""


def sampler(run: Run, per_call: int, *, warm_up: float = 0.2, sample: float = 0.01) -> Sampler:
    """A sampler of `run`, which is warmed up first.

    Args:
        run: what to time.
        per_call: how many units of work one call does; samples are times of one unit.
        warm_up: seconds to run before the first sample.
        sample: seconds that one sample lasts at least.
    """
    run(3)
    single = max(run(3) / 3, 1e-7)
    run(max(3, math.ceil(warm_up / single)))
    count = max(1, math.ceil(sample / single))
    count = max(1, math.ceil(sample / max(run(count) / count, 1e-7)))

    def take(samples: int) -> list[float]:
        run(count)
        return [run(count) / count / per_call * 1e6 for _ in range(samples)]

    return take


def in_turns(
    samplers: Mapping[str, Sampler], *, rounds: int = 3, samples: int = 7
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples every contender `samples` times in each of `rounds` rounds.

    Returns:
        The samples in microseconds by name, and the reason by name for those that failed.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, take in samplers.items():
            if name in failed:
                continue
            try:
                taken[name] += take(samples)
            except Exception as error:
                failed[name] = reason(error)
    return {name: us for name, us in taken.items() if name not in failed}, failed


def summary(us: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    if len(us) < 2:
        return {"us": us[0], "p10": us[0], "p90": us[0]}
    tenths = statistics.quantiles(us, n=10, method="inclusive")
    return {"us": statistics.median(us), "p10": tenths[0], "p90": tenths[-1]}


def reason(error: BaseException) -> str:
    """An exception in one line."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and driver of the first NVIDIA GPU; empty where there is none."""
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version")
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (part.strip() for part in answer.stdout.split(",")), strict=False))

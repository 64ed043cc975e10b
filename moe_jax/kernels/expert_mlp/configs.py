"""How the kernels are tiled, by how many rows an expert has: pure data, that needs no Triton."""

import dataclasses
import math

TILE = 64
"""Inputs of a tile of weights."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How one matmul is tiled.

    Attributes:
        outputs: outputs of the weight a program computes; at least 16 a warp.
        heights: how many tokens a program takes at most, ascending. The last is the size of the
            blocks that an expert's tokens are cut into; blocks with fewer tokens are computed as
            the least of the heights that holds them.
        num_warps: warps a program.
        stages: steps of activations that are in flight from memory.
        tiles: tiles of 64 inputs a step.
        splits: how many programs share the inputs; each writes sums of its own.
    """

    outputs: int
    heights: tuple[int, ...]
    num_warps: int
    stages: int
    tiles: int = 3
    splits: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.heights[-1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a layer is computed.

    Attributes:
        sorted: whether pairs are sorted and an expert's weights serve all its tokens. If not, each
            pair is a program's own, and reads its expert's weights.
        gate_up: the first matmul.
        down: the second.
    """

    sorted: bool
    gate_up: Config
    down: Config


@dataclasses.dataclass(frozen=True)
class Regime:
    """A plan, and the largest layers that it is for.

    Attributes:
        rows: tokens an expert has on average, at most.
        pairs: pairs of a token and an expert, at most.
        plan: how they are computed.
    """

    rows: float
    pairs: float
    plan: Plan


def _both(is_sorted: bool, config: Config, splits: int = 1) -> Plan:
    return Plan(is_sorted, config, dataclasses.replace(config, splits=splits))


_NARROW = Config(64, (8,), num_warps=4, stages=4)

HOPPER = (
    Regime(0.5, 4, _both(False, _NARROW, splits=5)),
    Regime(0.5, 12, _both(False, _NARROW, splits=3)),
    Regime(2, math.inf, _both(True, _NARROW)),
    Regime(6, math.inf, _both(True, Config(64, (8, 16), num_warps=4, stages=4))),
    Regime(24, math.inf, _both(True, Config(128, (16, 32), num_warps=8, stages=3))),
    Regime(math.inf, math.inf, _both(True, Config(128, (32, 64, 128), num_warps=4, stages=2))),
)
"""For compute capability 9.0, measured on an H200 with 32 experts, 4 a token, and sizes of 2880."""

PORTABLE = (
    Regime(8, math.inf, _both(True, Config(64, (16,), num_warps=4, stages=2, tiles=1))),
    Regime(48, math.inf, _both(True, Config(64, (64,), num_warps=4, stages=2, tiles=1))),
    Regime(math.inf, math.inf, _both(True, Config(128, (128,), num_warps=8, stages=2, tiles=1))),
)
"""For every other GPU."""


def plan(regimes: tuple[Regime, ...], num_pairs: int, num_experts: int) -> Plan:
    """The plan for so many pairs."""
    rows = num_pairs / num_experts
    return next(r.plan for r in regimes if rows <= r.rows and num_pairs <= r.pairs)


def fit(config: Config, in_size: int) -> Config:
    """The configuration with as many splits and tiles a step as divide inputs of that size."""
    across = -(-in_size // TILE)
    tiles = next(t for t in (config.tiles, 4, 2, 1) if not across % t)
    splits = next(s for s in range(config.splits, 0, -1) if not across % (tiles * s))
    return dataclasses.replace(config, tiles=tiles, splits=splits)


def num_blocks(config: Config, num_rows: int, num_experts: int, *, is_sorted: bool = True) -> int:
    """The blocks of rows that any sizes of the experts' groups need, at most."""
    if not is_sorted:
        return num_rows
    return min(num_rows, num_rows // config.tokens + num_experts)

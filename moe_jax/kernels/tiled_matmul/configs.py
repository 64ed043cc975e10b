"""How the kernels are tiled, by how many rows an expert has: pure data, that needs no Triton."""

import dataclasses
import math
from typing import Literal

TILE = 64
"""Inputs of a tile of weights."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How one matmul is tiled.

    Attributes:
        instruction: what multiplies: `mma` (mma.sync; for few tokens) or `wgmma` (of a warpgroup;
            for many) in the Hopper kernels, and in the portable ones `dot`, what Triton chooses.
        outputs: outputs of the weight a program computes; at least 16 a warp.
        heights: how many tokens a program takes at most, ascending, each as the powers of two that
            it is the sum of: a product for each. An expert's tokens are cut into as few blocks as
            the last allows, of one size; each is computed as the least height that holds it.
        num_warps: warps a program.
        stages: steps of activations that are in flight from memory.
        tiles: tiles of 64 inputs a step, at most; that many tiles of weights are in flight.
        splits: how many programs share the inputs, at most; each writes sums of its own.
        registers: registers a thread, at most; None for as many as the compiler takes.
    """

    instruction: Literal["mma", "wgmma", "dot"]
    outputs: int
    heights: tuple[tuple[int, ...], ...]
    num_warps: int
    stages: int
    tiles: int
    splits: int = 1
    registers: int | None = None

    def __post_init__(self) -> None:
        tokens = [sum(parts) for parts in self.heights]
        if not tokens or tokens != sorted(set(tokens)):
            raise ValueError(f"heights must ascend, got {self.heights}")
        if self.instruction == "dot" and any(len(parts) > 1 for parts in self.heights):
            raise ValueError(f"'dot' makes one product a height, got {self.heights}")
        if self.instruction != "dot" and self.stages < 2:
            raise ValueError(f"{self.instruction!r} needs 2 stages or more, got {self.stages}")
        if self.outputs % (16 * self.num_warps):
            raise ValueError(
                f"outputs must be a multiple of 16 a warp, got {self.outputs} for "
                f"{self.num_warps} warps"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a block, at most."""
        return sum(self.heights[-1])


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

    def __post_init__(self) -> None:
        if not self.is_one_kernel:
            return
        for name in ("heights", "num_warps", "registers"):
            first, second = getattr(self.gate_up, name), getattr(self.down, name)
            if first != second:
                raise ValueError(f"both matmuls are one kernel: {name} {first} and {second} differ")

    @property
    def is_one_kernel(self) -> bool:
        """Whether both matmuls are one kernel: the second begins where the first leaves room.

        Not for pairs that are not sorted: that few programs end together, and what one waits for
        takes longer to reach it than a kernel takes to start.
        """
        return self.sorted and self.gate_up.instruction != "dot"


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


def _narrow(*heights: tuple[int, ...], tiles: int = 5, splits: int = 1) -> Config:
    return Config("mma", 64, heights, num_warps=4, stages=2, tiles=tiles, splits=splits)


def _wide(*heights: tuple[int, ...], stages: int = 2, registers: int | None = None) -> Config:
    return Config("wgmma", 128, heights, 4, stages, tiles=3, registers=registers)


def _portable(outputs: int, tokens: int, num_warps: int) -> Plan:
    config = Config("dot", outputs, ((tokens,),), num_warps, stages=2, tiles=1)
    return Plan(True, config, config)


# few enough registers for four programs a multiprocessor
_FEWEST = _wide((16,), (32,), stages=3, registers=128)
_FEW = _wide((32,), (32, 8), (32, 16))
_MEDIUM = _wide((64,), (64, 16), (64, 32))
_LARGE = _wide((32,), (64,), (64, 32), (128,), (128, 8))

HOPPER = (
    Regime(0.5, 4, Plan(False, _narrow((8,), tiles=15), _narrow((8,), tiles=9, splits=5))),
    Regime(0.5, 8, Plan(False, _narrow((8,), tiles=9), _narrow((8,), tiles=9, splits=5))),
    Regime(0.5, math.inf, Plan(True, _narrow((8,)), _narrow((8,), splits=3))),
    Regime(2, math.inf, Plan(True, _narrow((8,)), _narrow((8,)))),
    Regime(12, math.inf, Plan(True, _narrow((8,), (16,)), _narrow((8,), (16,)))),
    Regime(24, math.inf, Plan(True, _FEWEST, _FEWEST)),
    Regime(48, math.inf, Plan(True, _FEW, _FEW)),
    Regime(96, math.inf, Plan(True, _MEDIUM, _MEDIUM)),
    Regime(math.inf, math.inf, Plan(True, _LARGE, _LARGE)),
)
"""For compute capability 9.0, measured on an H200 with 32 experts, 4 a token, and sizes of 2880.

`benchmarks/moe_layer_notes.md` has the measurements.
"""

PORTABLE = (
    Regime(8, math.inf, _portable(64, 16, num_warps=4)),
    Regime(48, math.inf, _portable(64, 64, num_warps=4)),
    Regime(math.inf, math.inf, _portable(128, 128, num_warps=8)),
)
"""For every other GPU."""


def plan(regimes: tuple[Regime, ...], num_pairs: int, num_experts: int) -> Plan:
    """The plan for so many pairs."""
    rows = num_pairs / num_experts
    return next(r.plan for r in regimes if rows <= r.rows and num_pairs <= r.pairs)


def fit(config: Config, in_size: int) -> Config:
    """The configuration with as many splits and tiles a step as divide inputs of that size."""
    across = -(-in_size // TILE)
    tiles = next(t for t in range(config.tiles, 0, -1) if not across % t)
    splits = next(s for s in range(config.splits, 0, -1) if not across % (tiles * s))
    return dataclasses.replace(config, tiles=tiles, splits=splits)


def num_blocks(config: Config, num_rows: int, num_experts: int, *, is_sorted: bool = True) -> int:
    """The blocks of rows that any sizes of the experts' groups need, at most."""
    if not is_sorted:
        return num_rows
    return min(num_rows, num_rows // config.tokens + num_experts)

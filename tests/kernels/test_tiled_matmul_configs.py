"""The table of configurations: which plan a layer gets, and what no kernel runs."""

import dataclasses

import numpy as np
import pytest

from moe_jax.kernels.tiled_matmul import configs


def test_plans_follow_the_sizes():
    def plan(tokens, experts=32, k=4):
        return configs.plan(configs.HOPPER, tokens * k, experts)

    assert not plan(1).sorted and not plan(2).sorted and plan(3).sorted
    assert plan(1).down.splits == 5 and plan(3).down.splits == 3
    assert not plan(1, experts=128).sorted
    assert plan(1, experts=4).sorted  # every expert is read anyway
    heights = [plan(t).gate_up.tokens for t in (4, 16, 17, 48, 49, 192, 193, 10**6)]
    assert heights == sorted(heights) and heights[-1] > 128


def test_configurations_fit_the_inputs():
    config = configs.Config("mma", 64, ((8,),), num_warps=4, stages=2, tiles=3, splits=5)
    for size, tiles, splits in ((2880, 3, 5), (4096, 2, 4), (128, 2, 1), (64, 1, 1), (960, 3, 5)):
        fitted = configs.fit(config, size)
        assert (fitted.tiles, fitted.splits) == (tiles, splits)
        assert size // 64 % (tiles * splits) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heights": ((16,), (8,))}, "heights must ascend"),
        ({"heights": ()}, "heights must ascend"),
        ({"instruction": "dot", "heights": ((16, 8),)}, "one product a height"),
        ({"stages": 1}, "needs 2 stages"),
        ({"outputs": 96}, "a multiple of 16 a warp"),
    ],
)
def test_configurations_that_no_kernel_runs_are_refused(changes, message):
    good = configs.Config("mma", 64, ((8,), (16,)), num_warps=4, stages=2, tiles=5)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **changes)


def test_one_kernel_has_one_size():
    config = configs.Config("mma", 64, ((8,), (16,)), num_warps=4, stages=2, tiles=5)
    assert configs.Plan(True, config, dataclasses.replace(config, splits=3)).is_one_kernel
    for changes in ({"heights": ((8,),)}, {"registers": 64}, {"num_warps": 2}):
        other = dataclasses.replace(config, **changes)
        assert not configs.Plan(False, config, other).is_one_kernel
        with pytest.raises(ValueError, match=f"{next(iter(changes))} .* differ"):
            configs.Plan(True, config, other)


def test_blocks_are_enough_for_any_sizes(rng):
    config = configs.Config("mma", 64, ((8,), (8, 8)), num_warps=4, stages=2, tiles=5)
    for _ in range(200):
        num_rows, experts = rng.integers(1, 80), rng.integers(1, 9)
        cuts = np.sort(rng.integers(0, num_rows + 1, experts - 1))
        sizes = np.diff([0, *cuts, num_rows])
        assert (-(-sizes // 16)).sum() <= configs.num_blocks(config, num_rows, experts)

"""The float kernels against NumPy in float64; run by test_triton_floats in a process of its own.

Results start as NaN, so that a test sees elements that no program writes.
"""

import numpy as np
import pytest
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_tools import HostTensor

from moe_jax.kernels.grouped_matmul import triton_floats as kernels
from moe_jax.kernels.grouped_matmul.tiles import Config

GROUPS = {
    "no_rows": (0, [0, 0, 0]),
    "one_row": (1, [0, 1, 0]),
    "rows_past_the_sum": (17, [3, 0, 6]),
    "uneven": (100, [50, 0, 37, 13]),
    "none_of_the_rows": (7, [0, 0]),
    "all_rows_on_the_last": (70, [0, 70]),
    "empty_experts": (51, [1, 49, 1, 0, 0]),
    "whole_blocks": (48, [16, 32]),
}
CONFIGS = {
    "pointers": Config(16, 32, 16, num_warps=4, num_stages=3, group=2),
    "descriptors": Config(16, 32, 16, num_warps=4, num_stages=3, descriptors=True),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request) -> Config:
    return request.param


def run(launch: kernels.Launch, first, second, sizes, shape) -> np.ndarray:
    result = np.full(shape, np.nan, np.float32)
    arrays = first, second.reshape(-1, second.shape[-1])
    operands = [HostTensor(array) for array in arrays]
    if launch.config.descriptors:
        operands = [
            TensorDescriptor(operand, list(array.shape), [array.shape[1], 1], list(block))
            for operand, array, block in zip(operands, arrays, launch.blocks, strict=True)
        ]
    launch.kernel[launch.grid](
        *operands,
        HostTensor(np.asarray(sizes, np.int32)),
        len(first),
        HostTensor(result),
        **launch.constants,
    )
    return result


def all_three(config: Config, rows, weight, gradient, sizes):
    """The product and the gradients of rows and weight."""
    experts, n, k = weight.shape
    count = len(rows)
    forward = kernels.multiply_launch(count, experts, n, k, config, n_inner=False)
    backward = kernels.multiply_launch(count, experts, k, n, config, n_inner=True)
    outer = kernels.outer_products_launch(experts, n, k, config)
    return (
        run(forward, rows, weight, sizes, (count, n)),
        run(backward, gradient, weight, sizes, (count, k)),
        run(outer, gradient, rows, sizes, weight.shape),
    )


def oracle(rows, weight, gradient, sizes):
    rows, weight, gradient = (a.astype(np.float64) for a in (rows, weight, gradient))
    results = np.zeros(gradient.shape), np.zeros(rows.shape), np.zeros(weight.shape)
    for r, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        results[0][r] = weight[e] @ rows[r]
        results[1][r] = gradient[r] @ weight[e]
        results[2][e] += np.outer(gradient[r], rows[r])
    return results


def operands(count: int, experts: int, n: int, k: int):
    rng = np.random.default_rng(count + n)
    shapes = (count, k), (experts, n, k), (count, n)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("sizes_of_weight", [(7, 13), (40, 56), (32, 48)], ids=str)
@pytest.mark.parametrize("case", GROUPS)
def test_values(config, case, sizes_of_weight):
    count, sizes = GROUPS[case]
    if config.descriptors and (sizes_of_weight == (7, 13) or not count):
        pytest.skip("TMA loads no rows that start off a multiple of 16 bytes, nor an empty array")
    arrays = operands(count, len(sizes), *sizes_of_weight)
    for ours, expected in zip(
        all_three(config, *arrays, sizes), oracle(*arrays, sizes), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_stay_with_their_expert(config, bad):
    sizes = [20, 0, 23, 5]
    rows, weight, gradient = operands(53, 4, 40, 56)
    expected = oracle(rows, weight, gradient, sizes)
    rows[[3, 49], 0] = bad  # of expert 0, and past the sum
    gradient[[45, 49], 0] = bad  # of expert 3, and past the sum
    product, of_rows, of_weight = all_three(config, rows, weight, gradient, sizes)
    good = np.arange(53) != 3
    np.testing.assert_allclose(product[good], expected[0][good], rtol=0, atol=2e-5)
    good = np.arange(53) != 45
    np.testing.assert_allclose(of_rows[good], expected[1][good], rtol=0, atol=2e-5)
    np.testing.assert_allclose(of_weight[1:3], expected[2][1:3], rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("out", [40, 72, 48, 8])  # of steps of 16: some end in the next expert
def test_bad_weights_stay_with_their_expert(config, out, bad):
    sizes = [20, 0, 23, 5]
    rows, weight, gradient = operands(48, 4, out, 56)
    expected = oracle(rows, weight, gradient, sizes)
    weight[[1, 3]] = bad
    product, of_rows, _ = all_three(config, rows, weight, gradient, sizes)
    np.testing.assert_allclose(product[:43], expected[0][:43], rtol=0, atol=2e-5)
    np.testing.assert_allclose(of_rows[:43], expected[1][:43], rtol=0, atol=2e-5)
    assert not np.isfinite(product[43:]).any() and not np.isfinite(of_rows[43:]).any()


def test_wrong_sizes_reach_no_other_memory(config):
    """More rows than there are, and fewer than none, count as those there are."""
    arrays = operands(20, 3, 8, 12)
    for ours, expected in zip(
        all_three(config, *arrays, [16, -3, 90]), oracle(*arrays, [16, 0, 4]), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)

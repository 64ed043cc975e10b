"""The float kernels without a GPU: what they compile to, and their arithmetic, interpreted."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from triton_tools import MISSING, compiled, run_interpreted

from moe_jax.kernels.grouped_matmul import floats, tiles

pytest.importorskip("triton", reason=MISSING)
pytest.importorskip("jax_triton", reason=MISSING)

SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a program may have, at least, on GPUs that get the same tiles."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
HIDDEN, EXPERTS = 2880, 32


def launch(operation: str, rows: int, inner: int, dtype: str, capability: int):
    """How the operation is launched for a weight [EXPERTS, 2 * HIDDEN, inner]."""
    from moe_jax.kernels.grouped_matmul import triton_floats as kernels

    out = 2 * HIDDEN
    if operation == "weight_gradient":
        config = tiles.for_weight_gradient((out, inner), dtype, capability)
        return kernels.outer_products_launch(EXPERTS, out, inner, config)
    n, k = (out, inner) if operation == "forward" else (inner, out)
    config = tiles.for_rows(rows, EXPERTS, (k, inner), dtype, capability)
    return kernels.multiply_launch(
        rows, EXPERTS, n, k, config, n_inner=operation == "rows_gradient"
    )


def compile_launch(launch, dtype: str, capability: int):
    element = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    kinds = dict.fromkeys(names, f"*{element}") | {"group_sizes": "*i32", "num_rows": "i32"}
    if launch.config.descriptors:
        for name, (height, width) in zip(names, launch.blocks, strict=False):
            kinds[name] = f"tensordesc<{element}[{height},{width}]>"
    config = launch.config
    return compiled(
        launch.kernel,
        kinds,
        launch.constants,
        capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@pytest.mark.parametrize(
    ("operation", "rows", "capability"),
    [
        ("forward", 4, 90),
        ("forward", 2048, 90),
        ("rows_gradient", 2048, 90),
        *itertools.product(["forward", "rows_gradient", "weight_gradient"], [32768], SHARED),
    ],
)
@pytest.mark.compiles
def test_fits_the_gpu(operation, rows, capability):
    plan = launch(operation, rows, HIDDEN, "bfloat16", capability)
    code = compile_launch(plan, "bfloat16", capability)
    print(f"{code.registers} registers, {code.spills} bytes spilled, {code.shared} bytes shared")
    assert code.spills == 0
    assert code.registers * plan.config.num_warps * 32 <= 65536
    assert code.shared <= SHARED[capability]
    if plan.config.block_m >= 64:
        assert TENSOR_CORES[capability] in code.ptx


@pytest.mark.parametrize("dtype", floats.DTYPES)
@pytest.mark.parametrize("operation", ["forward", "rows_gradient", "weight_gradient"])
@pytest.mark.compiles
def test_odd_sizes_fit_the_gpu(operation, dtype):
    """Sizes that TMA cannot load and no block divides; float32, whose products are exact."""
    code = compile_launch(launch(operation, 32768, 2887, dtype, 90), dtype, 90)
    print(f"{code.registers} registers, {code.spills} bytes spilled, {code.shared} bytes shared")
    assert code.spills == 0 and code.shared <= SHARED[90]
    assert (TENSOR_CORES[90] in code.ptx) == (dtype != "float32")


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.compiles
def test_a_last_step_of_fewer_terms_fits_the_gpu(capability):
    """By TMA, where the last block of weights has to be masked."""
    n, k = HIDDEN, 2 * HIDDEN + 8
    config = tiles.for_rows(32768, EXPERTS, (k, n), "bfloat16", capability)
    assert config.descriptors and k % config.block_k
    from moe_jax.kernels.grouped_matmul import triton_floats as kernels

    plan = kernels.multiply_launch(32768, EXPERTS, n, k, config, n_inner=True)
    code = compile_launch(plan, "bfloat16", capability)
    print(f"{code.registers} registers, {code.spills} bytes spilled, {code.shared} bytes shared")
    assert code.spills == 0 and code.shared <= SHARED[capability]
    assert TENSOR_CORES[capability] in code.ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("inner", [72, 13])
def test_kernels_are_called_with_what_they_take(monkeypatch, inner, capability):
    """Traced as for a GPU: jax-triton binds arrays, sizes and constants to the parameters."""
    monkeypatch.setattr(floats, "cuda_capability", lambda: capability)

    def calls(rows, weight, group_sizes, gradient):
        dtype = weight.dtype
        return (
            floats._multiply_in_triton(rows, weight, group_sizes, over="in"),
            floats._multiply_in_triton(gradient, weight, group_sizes, over="out"),
            floats._outer_products_in_triton(gradient, rows, group_sizes, dtype=dtype),
        )

    shapes = (300, inner), (3, 40, inner), (3,), (300, 40)
    dtypes = jnp.bfloat16, jnp.float32, jnp.int32, jnp.bfloat16
    jaxpr = jax.make_jaxpr(calls)(*map(jax.ShapeDtypeStruct, shapes, dtypes))
    assert [(a.shape, a.dtype) for a in jaxpr.out_avals] == [
        ((300, 40), jnp.bfloat16),
        ((300, inner), jnp.bfloat16),
        ((3, 40, inner), jnp.float32),
    ]
    kernels = [e.params for e in jaxpr.eqns if e.primitive.name == "triton_kernel_call"]
    assert len(kernels) == 3
    for params in kernels:
        names = {p.name for p in params["fn"].params if p.is_constexpr}
        assert set(params["metaparams"]) == names


@pytest.mark.slow
def test_values_in_the_interpreter():
    run_interpreted("interpreted_floats.py")


def test_tiles_follow_the_sizes():
    def rows(count, experts=32, axes=(2880, 5760), dtype="bfloat16", capability=90):
        return tiles.for_rows(count, experts, axes, dtype, capability)

    assert [rows(n).block_m for n in (1, 1024, 1025, 3072, 3073, 10**6)] == [
        16,
        16,
        64,
        64,
        128,
        128,
    ]
    assert rows(32768).descriptors and not rows(32768, capability=89).descriptors
    exact = rows(32768, dtype="float32")
    assert not exact.descriptors
    assert exact == rows(4, axes=(2880, 5761)) == rows(4, axes=(2884, 5760))
    assert exact == tiles.for_weight_gradient((2884, 5760), "bfloat16", 90)

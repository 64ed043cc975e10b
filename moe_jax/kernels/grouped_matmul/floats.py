"""The grouped matmul of float weights on bare arrays; each platform has its own backend.

Three operations, forwards and the two gradients, that are Triton kernels on NVIDIA GPUs and the
XLA reference elsewhere. Rows [rows, in], weight [experts, out, in], group_sizes i32 [experts].
"""

import functools
from typing import Any

import jax
import numpy as np

from moe_jax.kernels.grouped_matmul import reference, tiles
from moe_jax.kernels.lowering import cuda_capability, per_platform
from moe_jax.tagged import Tagged

DTYPES = ("bfloat16", "float16", "float32")
"""What the rows may be made of."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str | None
) -> jax.Array:
    """[rows, in] -> [rows, out]; `implementation` is None or "triton"."""
    return _multiply(rows, weight, group_sizes, implementation=implementation, over="in")


def _forward(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str | None
) -> Any:
    return multiply(rows, weight, group_sizes, implementation), (rows, weight, group_sizes)


def _backward(implementation: str | None, saved: Any, gradient: jax.Array) -> Any:
    rows, weight, group_sizes = saved
    of_rows = _multiply(gradient, weight, group_sizes, implementation=implementation, over="out")
    of_weight = _outer_products(
        gradient, rows, group_sizes, implementation=implementation, dtype=weight.dtype
    )
    return of_rows, of_weight, np.zeros(group_sizes.shape, jax.dtypes.float0)


multiply.defvjp(_forward, _backward)


def _multiply_in_xla(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, over: str
) -> jax.Array:
    blocks = reference.plan_blocks(group_sizes, rows.shape[0])
    return reference.multiply(rows, Tagged(weight, ("expert", "out", "in")), blocks, over)


def _multiply_in_triton(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, over: str
) -> jax.Array:
    from moe_jax.kernels.grouped_matmul import triton_floats as kernels

    num_rows, k = rows.shape
    experts, out, inner = weight.shape
    n = out if over == "in" else inner
    config = tiles.for_rows(num_rows, experts, (k, inner), rows.dtype, cuda_capability())
    launch = kernels.multiply_launch(num_rows, experts, n, k, config, n_inner=over == "out")
    result = jax.ShapeDtypeStruct((num_rows, n), rows.dtype)
    return kernels.call(launch, rows, weight.astype(rows.dtype), group_sizes, result)


def _outer_products_in_xla(
    gradient: jax.Array, rows: jax.Array, group_sizes: jax.Array, *, dtype: Any
) -> jax.Array:
    blocks = reference.plan_blocks(group_sizes, rows.shape[0])
    return reference.outer_products(gradient, rows, group_sizes.shape[0], dtype, blocks)


def _outer_products_in_triton(
    gradient: jax.Array, rows: jax.Array, group_sizes: jax.Array, *, dtype: Any
) -> jax.Array:
    from moe_jax.kernels.grouped_matmul import triton_floats as kernels

    experts, out, inner = group_sizes.shape[0], gradient.shape[1], rows.shape[1]
    config = tiles.for_weight_gradient((out, inner), rows.dtype, cuda_capability())
    launch = kernels.outer_products_launch(experts, out, inner, config)
    result = jax.ShapeDtypeStruct((experts, out, inner), dtype)
    return kernels.call(launch, gradient, rows, group_sizes, result)


_multiply = per_platform("grouped_matmul", _multiply_in_xla, _multiply_in_triton)
_outer_products = per_platform(
    "grouped_outer_products", _outer_products_in_xla, _outer_products_in_triton
)

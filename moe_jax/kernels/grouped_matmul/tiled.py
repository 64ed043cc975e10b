"""The grouped matmul of tiled MXFP4 weights: a kernel on NVIDIA GPUs, the XLA reference elsewhere.

Rows bf16 [rows, in], sorted by expert, weight {expert, out, in}, group_sizes i32 [experts]. The
gradient of the rows is the reference's; the weight has none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.grouped_matmul import reference
from moe_jax.kernels.lowering import no_gradient, per_platform
from moe_jax.kernels.tiled_matmul import launch
from moe_jax.quantization.tiled import TiledMXFP4


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply(
    rows: jax.Array, weight: TiledMXFP4, group_sizes: jax.Array, implementation: str | None
) -> jax.Array:
    """[rows, in] -> [rows, out]; `implementation` is None or "triton"."""
    leaves, treedef = jax.tree.flatten(weight)
    return _multiply(rows, group_sizes, *leaves, treedef=treedef, implementation=implementation)


def _forward(
    rows: jax.Array, weight: TiledMXFP4, group_sizes: jax.Array, implementation: str | None
) -> Any:
    return multiply(rows, weight, group_sizes, implementation), (rows, weight, group_sizes)


def _backward(implementation: str | None, saved: Any, gradient: jax.Array) -> Any:
    del implementation
    rows, weight, group_sizes = saved
    blocks = reference.plan_blocks(group_sizes, rows.shape[0])
    of_rows = reference.multiply(gradient, weight, blocks, over="out")
    return of_rows, jax.tree.map(no_gradient, weight), no_gradient(group_sizes)


multiply.defvjp(_forward, _backward)


def _in_xla(rows: jax.Array, group_sizes: jax.Array, *leaves: jax.Array, treedef: Any) -> jax.Array:
    blocks = reference.plan_blocks(group_sizes, rows.shape[0])
    return reference.multiply(rows, jax.tree.unflatten(treedef, leaves), blocks, over="in")


def _in_triton(
    rows: jax.Array, group_sizes: jax.Array, *leaves: jax.Array, treedef: Any
) -> jax.Array:
    return launch.multiply_rows(rows, jax.tree.unflatten(treedef, leaves), group_sizes)


def _like(rows: jax.Array, group_sizes: jax.Array, *leaves: jax.Array, treedef: Any) -> jax.Array:
    """The shape of the result."""
    del group_sizes
    weight = jax.tree.unflatten(treedef, leaves)
    return jnp.broadcast_to(rows[:, :1], (rows.shape[0], weight.size("out")))


_multiply = per_platform("grouped_matmul_tiled", _in_xla, _in_triton, _like)

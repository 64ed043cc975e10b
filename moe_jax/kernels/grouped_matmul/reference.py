"""The grouped matmul in XLA: the definition that other backends are tested against.

Rows are laid out in blocks that belong to one expert each, and a loop runs over the blocks in use.
An iteration reads one expert's weight (and decodes it, where it is packed), so neither the number
of multiplications nor the memory grows with the number of experts, as it does with
`jax.lax.ragged_dot`, which XLA expands to a masked dense product on CPU and GPU.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dtypes import accumulator
from moe_jax.kernels.lowering import no_gradient
from moe_jax.quantization.packed import Packed
from moe_jax.tagged import Tagged

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """How sorted rows lie in blocks of one expert each; all arrays int32.

    Attributes:
        expert: [blocks] the expert of each block; an arbitrary one in blocks not in use.
        row: [blocks, size] the row in each place; the number of rows where the place is empty.
        place: [rows] where each row lies in the flattened blocks; their number where it has none.
        used: [] how many blocks hold rows; they come first.
    """

    expert: jax.Array
    row: jax.Array
    place: jax.Array
    used: jax.Array


def plan_blocks(group_sizes: jax.Array, num_rows: int, block_size: int | None = None) -> Blocks:
    """Lays out `num_rows` sorted rows in blocks; `group_sizes` is int [experts]."""
    num_experts = group_sizes.shape[0]
    size = block_size or choose_block_size(num_rows, num_experts)
    count = min(num_rows, num_rows // size + num_experts)
    blocks_of = -(-group_sizes // size)
    block_end, row_end = jnp.cumsum(blocks_of), jnp.cumsum(group_sizes)
    block_start, row_start = block_end - blocks_of, row_end - group_sizes

    block = jnp.arange(count, dtype=jnp.int32)
    expert = jnp.searchsorted(block_end, block, side="right", method="compare_all")
    expert = jnp.minimum(expert, num_experts - 1).astype(jnp.int32)
    within = (block - block_start[expert])[:, None] * size + jnp.arange(size)[None, :]
    filled = (within < group_sizes[expert][:, None]) & (block < block_end[-1])[:, None]
    row = jnp.where(filled, row_start[expert][:, None] + within, num_rows)

    rows = jnp.arange(num_rows, dtype=jnp.int32)
    owner = jnp.searchsorted(row_end, rows, side="right", method="compare_all")
    owner = jnp.minimum(owner, num_experts - 1)
    place = block_start[owner] * size + rows - row_start[owner]
    place = jnp.where(rows < row_end[-1], place, count * size)
    int32 = jnp.int32
    return Blocks(expert, row.astype(int32), place.astype(int32), block_end[-1].astype(int32))


def choose_block_size(num_rows: int, num_experts: int) -> int:
    """The power of two next to the mean number of rows an expert gets, within bounds."""
    mean = max(1, num_rows // num_experts)
    return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, 1 << (mean - 1).bit_length()))


def to_blocks(rows: jax.Array, blocks: Blocks) -> jax.Array:
    """[rows, n] -> [blocks, size, n], zero in empty places."""
    return rows.at[blocks.row].get(mode="fill", fill_value=0)


def from_blocks(values: jax.Array, blocks: Blocks) -> jax.Array:
    """[blocks, size, n] -> [rows, n], zero for rows without a place."""
    flat = values.reshape(-1, values.shape[-1])
    return flat.at[blocks.place].get(mode="fill", fill_value=0)


def grouped_matmul(rows: Tagged, weight: Tagged | Packed, group_sizes: Tagged) -> Tagged:
    """See `api`."""
    x = rows.untag("row", "in")
    if isinstance(weight, Tagged):
        weight = weight.order("expert", "out", "in")
    if not rows.size("row"):
        return Tagged(jnp.zeros_like(x, shape=(0, weight.size("out"))), ("row", "out"))
    return Tagged(_grouped_matmul(x, weight, group_sizes.array), ("row", "out"))


@jax.custom_vjp
def _grouped_matmul(x: jax.Array, weight: Tagged | Packed, group_sizes: jax.Array) -> jax.Array:
    blocks = plan_blocks(group_sizes, x.shape[0])
    return multiply(x, weight, blocks, over="in")


def _forward(x: jax.Array, weight: Tagged | Packed, group_sizes: jax.Array) -> Any:
    blocks = plan_blocks(group_sizes, x.shape[0])
    return multiply(x, weight, blocks, over="in"), (x, weight, blocks, group_sizes)


def _backward(saved: Any, gradient: jax.Array) -> Any:
    x, weight, blocks, group_sizes = saved
    x_gradient = multiply(gradient, weight, blocks, over="out")
    if isinstance(weight, Tagged):
        array = outer_products(gradient, x, group_sizes.shape[0], weight.dtype, blocks)
        weight_gradient = Tagged(array, ("expert", "out", "in"))
    else:
        weight_gradient = jax.tree.map(no_gradient, weight)
    return x_gradient, weight_gradient, no_gradient(group_sizes)


_grouped_matmul.defvjp(_forward, _backward)


def multiply(x: jax.Array, weight: Tagged | Packed, blocks: Blocks, over: str) -> jax.Array:
    """Sums over `over`, `in` or `out`: [rows, over] -> [rows, the weight's other axis]."""
    other = "out" if over == "in" else "in"
    x_blocks = to_blocks(x, blocks)
    count, size, _ = x_blocks.shape
    wide = accumulator(x.dtype)

    def step(i: jax.Array, result: jax.Array) -> jax.Array:
        one = expert_weight(weight, blocks.expert[i], x.dtype)
        product = jnp.dot(
            x_blocks[i],
            one.untag(over, other),
            preferred_element_type=wide,
        )
        return result.at[i].set(product.astype(x.dtype))

    result = jnp.zeros_like(x_blocks, shape=(count, size, weight.size(other)))
    return from_blocks(lax.fori_loop(0, blocks.used, step, result), blocks)


def outer_products(
    gradient: jax.Array, x: jax.Array, num_experts: int, dtype: Any, blocks: Blocks
) -> jax.Array:
    """[rows, out], [rows, in] -> [experts, out, in]: sums of outer products over each group."""
    gradient_blocks, x_blocks = to_blocks(gradient, blocks), to_blocks(x, blocks)
    wide = accumulator(x.dtype)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        product = jnp.dot(
            gradient_blocks[i].T,
            x_blocks[i],
            preferred_element_type=wide,
        )
        return total.at[blocks.expert[i]].add(product)

    total = jnp.zeros_like(x, wide, shape=(num_experts, gradient.shape[1], x.shape[1]))
    return lax.fori_loop(0, blocks.used, step, total).astype(dtype)


def expert_weight(weight: Tagged | Packed, expert: Any, dtype: Any) -> Tagged:
    """The float weight {out, in} of one expert."""
    one = weight.take(expert, "expert")
    return one.astype(dtype) if isinstance(one, Tagged) else one.dequantize(dtype)

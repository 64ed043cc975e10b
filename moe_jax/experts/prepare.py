"""Weights in the layout that the kernels read, made once and kept."""

from typing import Any

import jax
from flax import nnx

from moe_jax.kernels.lowering import has_kernels
from moe_jax.quantization.mxfp4 import BlockScaled
from moe_jax.quantization.packed import is_packed
from moe_jax.quantization.tiled import TiledMXFP4, tile_mxfp4
from moe_jax.variables import Variables


def prepare_experts[T](experts: T) -> T:
    """Lays packed weights out for NVIDIA GPUs; call it once, after loading.

    Every `BlockScaled` {expert, out, in}, in blocks along `in`, becomes a `TiledMXFP4` with the
    same numbers. Everything else stays as it is, so that a second call changes nothing. Every
    layer takes either kind, on every device, with the same results. `restore_experts` goes back.
    Where experts are spread over several GPUs, tell the layer so (`sharding`) or call it inside
    `jax.shard_map`: XLA cannot split a kernel, and would bring all experts to every device.

    Weights are laid out one after the other where called outside `jax.jit`: besides what `experts`
    holds and what is returned, a device holds little. To keep no more than one weight twice, call
    this for each and drop what was given.

    Args:
        experts: any pytree: an expert layer, one weight, or all parameters of a model.

    Raises:
        TypeError: there is a Flax module that holds packed weights; they must be prepared before.
    """
    return _map_packed(_tile, experts)


def prepare_for_devices[T](experts: T) -> T:
    """`prepare_experts` for those packed weights that lie where kernels run that read them.

    Those are NVIDIA GPUs, with jax-triton installed: without it, or on other devices, weights would
    be laid out anew at each use.
    """

    def one(weight: Any) -> Any:
        leaves = jax.tree.leaves(weight)
        return _tile(weight) if all(has_kernels(leaf.devices()) for leaf in leaves) else weight

    return _map_packed(one, experts)


def restore_experts[T](experts: T) -> T:
    """Every `TiledMXFP4` in a pytree as the `BlockScaled` it was made of, bit for bit.

    Raises:
        TypeError: there is a Flax module that holds packed weights.
    """
    return _map_packed(_untile, experts)


def _tile(weight: Any) -> Any:
    if not isinstance(weight, BlockScaled):
        return weight
    if weight.axis != "in" or set(weight.axes) != {"expert", "out", "in"}:
        return weight
    ordered = BlockScaled(
        weight.blocks.order("expert", "out", "block", "byte"),
        weight.scales.order("expert", "out", "block"),
    )
    return jax.block_until_ready(tile_mxfp4(ordered))


def _untile(weight: Any) -> Any:
    return jax.block_until_ready(weight.untile()) if isinstance(weight, TiledMXFP4) else weight


def _map_packed(function: Any, tree: Any) -> Any:
    def one(node: Any) -> Any:
        if isinstance(node, nnx.Module):
            _check_module(node)
            return node
        return function(node)

    return jax.tree.map(one, tree, is_leaf=lambda n: is_packed(n) or isinstance(n, nnx.Module))


def _check_module(module: nnx.Module) -> None:
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Variables) and any(
            map(is_packed, jax.tree.leaves(part.tree(), is_leaf=is_packed))
        ):
            raise TypeError(
                f"{type(module).__name__} holds packed experts as Flax variables: prepare or "
                f"restore them before they go into the module"
            )

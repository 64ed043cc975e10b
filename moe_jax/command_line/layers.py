"""What is told of a layer that was read."""

from typing import Any

import jax
from flax import nnx

from moe_jax.command_line.summary import Summary
from moe_jax.layer import MoE
from moe_jax.quantization.integer import PackedIntegers
from moe_jax.quantization.mxfp4 import BlockScaled
from moe_jax.quantization.packed import is_packed
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import is_tagged
from moe_jax.variables import Variables, value

_MATRICES = ("gate_up", "gate", "up", "down", "wi_0", "wi_1", "wo")
_DOWN = ("down", "wo")


def describe_layer(name: str, format: str, layer: MoE) -> Summary:
    """The summary of a layer with its router."""
    weight = value(layer.router_weight)
    arrays = {
        field: value(getattr(layer, field))
        for field in ("router_weight", "router_bias", "router_norm_weight", "selection_bias")
        if getattr(layer, field) is not None
    }
    return describe_experts(
        name,
        format,
        layer.experts.tree() if isinstance(layer.experts, Variables) else layer.experts,
        num_experts=weight.size("expert"),
        hidden_size=weight.size("d"),
        experts_per_token=layer.config.experts_per_token,
        router=arrays,
    )


def describe_experts(
    name: str,
    format: str,
    experts: Any,
    *,
    num_experts: int | None = None,
    hidden_size: int | None = None,
    experts_per_token: int | None = None,
    router: dict[str, Any] | None = None,
) -> Summary:
    """The summary of experts, and of what is known of their router."""
    fields = {} if isinstance(experts, nnx.Module) else vars(experts)
    matrices = {f: w for f, w in fields.items() if f in _MATRICES and w is not None}
    down = next((matrices[f] for f in _DOWN if f in matrices), None)
    activation = fields.get("activation")
    leaves = jax.tree.leaves_with_path(experts, is_leaf=is_tagged)
    tensors = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}
    tensors = {**(router or {}), **{f"experts.{key}": leaf for key, leaf in tensors.items()}}
    return Summary(
        name=name,
        format=format,
        experts=type(experts).__name__,
        num_experts=down.size("expert")
        if num_experts is None and down is not None
        else num_experts or 0,
        hidden_size=down.size("out") if hidden_size is None and down is not None else hidden_size,
        intermediate_size=None if down is None else down.size("in"),
        experts_per_token=experts_per_token,
        activation=None if activation is None else activation.kind,
        weights=" + ".join(sorted({_weights(w) for w in matrices.values()})) or "none",
        nbytes=sum(leaf.array.nbytes for leaf in tensors.values()),
        tensors={key: f"{leaf.dtype}{list(leaf.shape)}" for key, leaf in tensors.items()},
    )


def _weights(weight: Any) -> str:
    """The number format of a matrix."""
    if isinstance(weight, BlockScaled | TiledMXFP4):
        return "mxfp4"
    if isinstance(weight, PackedIntegers):
        rows = weight.group_size == weight.size(weight.axis)
        groups = "rows" if rows else f"groups of {weight.group_size}"
        return f"int{weight.bits} in {groups}"
    return type(weight).__name__ if is_packed(weight) else str(weight.dtype)

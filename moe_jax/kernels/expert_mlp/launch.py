"""The Triton kernels as functions of JAX arrays; see `api` for what they compute.

They are called while lowering for CUDA, and only then import Triton.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.activations import Activation
from moe_jax.kernels.dispatch import launch as dispatch
from moe_jax.kernels.dispatch.pairs import RoutedPairs, SortedPairs
from moe_jax.kernels.expert_mlp import configs
from moe_jax.kernels.expert_mlp.configs import Config
from moe_jax.kernels.gluon_call import gluon_call
from moe_jax.kernels.lowering import cuda_capability
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import Tagged

_EXACT_PAIRS = 1024
"""Up to so many pairs, what experts return is kept in float32 until it is summed."""


def routed_layer(
    experts: Any, x: jax.Array, logits: jax.Array, token_mask: jax.Array | None, k: int
) -> jax.Array:
    """Experts (a `GptOssMLP`) on x [T, d], routed by logits [T, E] -> [T, d]."""
    return _layer(experts, x, dispatch.route_pairs(logits, token_mask, experts_per_token=k))


def layer(experts: Any, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Experts (a `GptOssMLP`) on x [T, d], with ids i32 and weights f32 [T, k] -> [T, d]."""
    num_experts = experts.gate_up.size("expert")
    plan = _plan(experts, ids.size)
    if plan.sorted:
        pairs = dispatch.sort_pairs(ids, num_experts=num_experts)
    else:
        pairs = SortedPairs(ids.reshape(-1), ids.reshape(-1))  # not read
    return _layer(experts, x, RoutedPairs(ids, weights.reshape(-1), *pairs))


def multiply_rows(rows: jax.Array, weight: TiledMXFP4, group_sizes: jax.Array) -> jax.Array:
    """The grouped matmul: rows bf16 [R, in], sorted by expert, group_sizes i32 [E] -> [R, out]."""
    num_rows, num_experts = rows.shape[0], weight.size("expert")
    out = jax.ShapeDtypeStruct((num_rows, weight.size("out")), rows.dtype)
    if not num_rows:
        return jnp.zeros(out.shape, out.dtype)
    kernels, regimes = _kernels(weight)
    config = configs.plan(regimes, num_rows, num_experts).gate_up
    result = _multiply(
        kernels.rows_kernel,
        config,
        weight,
        num_rows,
        (rows,),
        (group_sizes, num_rows),
        out,
    )
    written = jnp.arange(num_rows) < jnp.maximum(group_sizes, 0).sum()
    return jnp.where(written[:, None], result, jnp.zeros((), rows.dtype))


def _layer(experts: Any, x: jax.Array, pairs: RoutedPairs) -> jax.Array:
    if not x.size or not pairs.ids.size:
        return jnp.zeros_like(x)
    (num_tokens, size), num_pairs = x.shape, pairs.pair_weight.shape[0]
    plan = _plan(experts, num_pairs)
    kernels, _ = _kernels(experts.gate_up, experts.down)
    where = pairs.ids.reshape(-1), pairs.group_sizes, pairs.order
    hidden = _multiply(
        kernels.gate_up_kernel,
        plan.gate_up,
        experts.gate_up,
        num_pairs,
        (x,),
        (_bias(experts.gate_up_bias), *where, num_pairs),
        jax.ShapeDtypeStruct((num_pairs, experts.down.size("in")), x.dtype),
        K=num_pairs // num_tokens,
        SORTED=plan.sorted,
        **_constants(experts.activation),
    )
    down = configs.fit(plan.down, experts.down.size("in"))
    dtype = jnp.float32 if num_pairs <= _EXACT_PAIRS else x.dtype
    y = _multiply(
        kernels.down_kernel,
        down,
        experts.down,
        num_pairs,
        (hidden,),
        (_bias(experts.down_bias), *where, pairs.pair_weight, num_pairs),
        jax.ShapeDtypeStruct((num_pairs * down.splits, size), dtype),
        SORTED=plan.sorted,
        SPLITS=down.splits,
    )
    num_experts = experts.gate_up.size("expert")
    return dispatch.combine_pairs(y, pairs.ids, num_experts=num_experts, dtype=x.dtype)


def _multiply(
    kernel: Any,
    config: Config,
    weight: TiledMXFP4,
    num_rows: int,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    out_type: jax.ShapeDtypeStruct,
    **constants: Any,
) -> jax.Array:
    """Calls a kernel, whose arguments are those before the weight's, the weight's, those after."""
    num_experts, in_size, out_size = (weight.size(axis) for axis in ("expert", "in", "out"))
    config = configs.fit(config, in_size)
    columns = -(-out_size // config.outputs)
    blocks = configs.num_blocks(
        config, num_rows, num_experts, is_sorted=constants.get("SORTED", True)
    )
    return _call(
        kernel,
        *before,
        weight.words.untag("expert", "tile_out", "tile_in", "lane", "word"),
        weight.scales.untag("expert", "tile_out", "tile_in", "group"),
        weight.factor.untag("expert", "out"),
        *after,
        out_type=out_type,
        grid=(columns * constants.get("SPLITS", 1) * blocks,),
        num_warps=config.num_warps,
        max_registers=config.registers,
        IN=in_size,
        OUT=out_size,
        E=num_experts,
        INSTRUCTION=config.instruction,
        OUTPUTS=config.outputs,
        HEIGHTS=config.heights,
        TILES=config.tiles,
        STAGES=config.stages,
        **constants,
    )


def _plan(experts: Any, num_pairs: int) -> configs.Plan:
    _, regimes = _kernels(experts.gate_up, experts.down)
    return configs.plan(regimes, num_pairs, experts.gate_up.size("expert"))


def _kernels(*weights: TiledMXFP4) -> tuple[Any, tuple[configs.Regime, ...]]:
    """The module of kernels, and its table of configurations."""
    if cuda_capability() == 90 and all(w.size("in") % configs.TILE == 0 for w in weights):
        from moe_jax.kernels.expert_mlp import hopper

        return hopper, configs.HOPPER
    from moe_jax.kernels.expert_mlp import portable

    return portable, configs.PORTABLE


def _constants(activation: Activation) -> dict[str, Any]:
    return {"ALPHA": activation.alpha, "BETA": activation.beta, "LIMIT": activation.limit}


def _bias(bias: Tagged) -> jax.Array:
    return bias.untag("expert", "out")


def _call(kernel: Any, *arguments: Any, max_registers: int | None, **options: Any) -> Any:
    if kernel.is_gluon():
        return gluon_call(*arguments, kernel=kernel, max_registers=max_registers, **options)
    import jax_triton

    # loops are staged already
    compiler = {"enable_fp_fusion": True, "maxnreg": max_registers}
    return jax_triton.triton_call(
        *arguments, kernel=kernel, num_stages=1, backend_options=compiler, **options
    )

"""The kernels as functions of JAX arrays.

They are called while lowering for CUDA, and only then import Triton.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.activations import Activation
from moe_jax.kernels.dispatch.pairs import RoutedPairs
from moe_jax.kernels.kernel_call import kernel_call
from moe_jax.kernels.lowering import cuda_capability
from moe_jax.kernels.tiled_matmul import configs
from moe_jax.kernels.tiled_matmul.configs import Config, Plan, Regime
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import Tagged

_TICKETS = 32
"""Counters before those of blocks; see `hopper.layer_kernel`."""


def plan(num_pairs: int, *weights: TiledMXFP4) -> Plan:
    """How so many rows are multiplied by weights of the same experts."""
    return configs.plan(_regimes(weights), num_pairs, weights[0].size("expert"))


def num_counters(plan: Plan, num_pairs: int, num_experts: int) -> int:
    """How many counters `mlp` needs, zeros; 0 for none."""
    if not plan.is_one_kernel:
        return 0
    return _TICKETS + configs.num_blocks(plan.gate_up, num_pairs, num_experts)


def mlp(
    experts: Any,
    x: jax.Array,
    pairs: RoutedPairs,
    counters: jax.Array,
    plan: Plan,
    dtype: Any,
) -> jax.Array:
    """Both matmuls of experts (a `GptOssMLP`), weighted: x [T, d] -> [P * splits, d] of `dtype`.

    The result is in the order of pairs. A pair's row is the sum of its `splits` neighbours.
    """
    if not plan.is_one_kernel:
        hidden = _gate_up(x, experts.gate_up, experts.gate_up_bias, experts.activation, pairs, plan)
        return _down(hidden, experts.down, experts.down_bias, pairs, plan, dtype)
    (num_tokens, size), inner = x.shape, experts.down.size("in")
    num_pairs, num_experts = pairs.pair_weight.shape[0], experts.gate_up.size("expert")
    first, second = configs.fit(plan.gate_up, size), configs.fit(plan.down, inner)
    columns = -(-2 * inner // first.outputs) + -(-size // second.outputs) * second.splits
    arrays = (
        x,
        *(*_arrays(experts.gate_up), experts.gate_up_bias.untag("expert", "out")),
        *(*_arrays(experts.down), experts.down_bias.untag("expert", "out")),
        *(pairs.group_sizes, pairs.order, pairs.pair_weight, counters),
    )
    results = (
        jax.ShapeDtypeStruct(counters.shape, counters.dtype),
        jax.ShapeDtypeStruct((num_pairs, inner), x.dtype),
        jax.ShapeDtypeStruct((num_pairs * second.splits, size), dtype),
    )
    return _call(
        _kernels(first).layer_kernel,
        *arrays,
        num_pairs,
        out_type=results,
        aliases={len(arrays) - 1: 0},
        grid=(columns * configs.num_blocks(first, num_pairs, num_experts),),
        num_warps=first.num_warps,
        max_registers=first.registers,
        SIZE=size,
        INNER=inner,
        E=num_experts,
        K=num_pairs // num_tokens,
        SPLITS=second.splits,
        TICKETS=_TICKETS,
        GATE_UP=_constants(first),
        DOWN=_constants(second),
        **_activation(experts.activation),
    )[2]


def _gate_up(
    x: jax.Array,
    weight: TiledMXFP4,
    bias: Tagged,
    activation: Activation,
    pairs: RoutedPairs,
    plan: Plan,
) -> jax.Array:
    """Each pair's token times its expert's weight, activated: x [T, in] -> [P, out // 2].

    The result is sorted as `pairs.order` where the plan is sorted, else in the order of pairs.
    """
    num_pairs = pairs.pair_weight.shape[0]
    return _multiply(
        "gate_up_kernel",
        configs.fit(plan.gate_up, x.shape[1]),
        x,
        weight,
        *(bias.untag("expert", "out"), pairs.ids.reshape(-1), pairs.group_sizes, pairs.order),
        num_rows=num_pairs,
        out_type=jax.ShapeDtypeStruct((num_pairs, weight.size("out") // 2), x.dtype),
        K=num_pairs // x.shape[0],
        SORTED=plan.sorted,
        **_activation(activation),
    )


def _down(
    hidden: jax.Array,
    weight: TiledMXFP4,
    bias: Tagged,
    pairs: RoutedPairs,
    plan: Plan,
    dtype: Any,
) -> jax.Array:
    """The rows of `_gate_up` times their experts' weight, weighted: [P, in] -> [P * splits, out].

    The result is in the order of pairs. A pair's row is the sum of its `splits` neighbours.
    """
    num_pairs = hidden.shape[0]
    config = configs.fit(plan.down, hidden.shape[1])
    where = pairs.ids.reshape(-1), pairs.group_sizes, pairs.order, pairs.pair_weight
    return _multiply(
        "down_kernel",
        config,
        hidden,
        weight,
        *(bias.untag("expert", "out"), *where),
        num_rows=num_pairs,
        out_type=jax.ShapeDtypeStruct((num_pairs * config.splits, weight.size("out")), dtype),
        SORTED=plan.sorted,
        SPLITS=config.splits,
    )


def multiply_rows(rows: jax.Array, weight: TiledMXFP4, group_sizes: jax.Array) -> jax.Array:
    """The grouped matmul: rows bf16 [R, in], sorted by expert, group_sizes i32 [E] -> [R, out]."""
    num_rows = rows.shape[0]
    out = jax.ShapeDtypeStruct((num_rows, weight.size("out")), rows.dtype)
    if not num_rows:
        return jnp.zeros(out.shape, out.dtype)
    config = configs.fit(plan(num_rows, weight).gate_up, rows.shape[1])
    result = _multiply(
        "rows_kernel", config, rows, weight, group_sizes, num_rows=num_rows, out_type=out
    )
    written = jnp.arange(num_rows) < jnp.maximum(group_sizes, 0).sum()
    return jnp.where(written[:, None], result, jnp.zeros((), rows.dtype))


def _multiply(
    kernel: str,
    config: Config,
    rows: jax.Array,
    weight: TiledMXFP4,
    *others: jax.Array,
    num_rows: int,
    out_type: jax.ShapeDtypeStruct,
    **constants: Any,
) -> jax.Array:
    """Calls the kernel of that name; others are its arguments between the weight and num_rows."""
    num_experts, in_size, out_size = (weight.size(axis) for axis in ("expert", "in", "out"))
    columns = -(-out_size // config.outputs)
    blocks = configs.num_blocks(
        config, num_rows, num_experts, is_sorted=constants.get("SORTED", True)
    )
    return _call(
        getattr(_kernels(config), kernel),
        rows,
        *_arrays(weight),
        *others,
        num_rows,
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


def _arrays(weight: TiledMXFP4) -> tuple[jax.Array, ...]:
    """A weight's words, scales and factors."""
    return (
        weight.words.untag("expert", "tile_out", "tile_in", "lane", "word"),
        weight.scales.untag("expert", "tile_out", "tile_in", "group"),
        weight.factor.untag("expert", "out"),
    )


def _activation(activation: Activation) -> dict[str, float | None]:
    """The constants of a SwiGLU."""
    return {"ALPHA": activation.alpha, "BETA": activation.beta, "LIMIT": activation.limit}


def _constants(config: Config) -> tuple[Any, ...]:
    """What `hopper.layer_kernel` is told of a configuration."""
    return config.outputs, config.heights, config.tiles, config.stages, config.instruction


def _regimes(weights: tuple[TiledMXFP4, ...]) -> tuple[Regime, ...]:
    """The table of configurations for this GPU and these weights."""
    if cuda_capability() == 90 and all(w.size("in") % configs.TILE == 0 for w in weights):
        return configs.HOPPER
    return configs.PORTABLE


def _kernels(config: Config) -> Any:
    """The module with the kernels of a configuration."""
    if config.instruction == "dot":
        from moe_jax.kernels.tiled_matmul import portable

        return portable
    from moe_jax.kernels.tiled_matmul import hopper

    return hopper


def _call(kernel: Any, *arguments: Any, max_registers: int | None, **options: Any) -> Any:
    if kernel.is_gluon():
        return kernel_call(*arguments, kernel=kernel, max_registers=max_registers, **options)
    import jax_triton

    # loops are staged already
    compiler = {"enable_fp_fusion": True, "maxnreg": max_registers}
    return jax_triton.triton_call(
        *arguments, kernel=kernel, num_stages=1, backend_options=compiler, **options
    )

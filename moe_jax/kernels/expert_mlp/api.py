"""A layer of gpt-oss experts with tiled MXFP4 weights, from the rows of tokens to their sums.

On NVIDIA GPUs these are a few kernels: one (two for many tokens) routes and sorts the pairs of a
token and an expert, one multiplies by `gate_up`, activates, multiplies by `down` and weighs (two on
GPUs that are not Hopper's, and for one or two tokens), one sums each token's pairs. Elsewhere it is
the dispatch in XLA, which defines what is computed. Shapes are static, contents dynamic, results
the same bits each time.

Gradients reach rows, routing and biases; the layer is then computed again, in `dispatch`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import dispatch
from moe_jax.experts.layers import GptOssMLP
from moe_jax.kernels.expert_mlp import launch
from moe_jax.kernels.lowering import no_gradient, per_platform, vary_together
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.routing import Routing, own_pairs, route
from moe_jax.tagged import Tagged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits:
    """Routing that is still to be done, by the default `Router`.

    Attributes:
        logits: float {s, expert}.
        token_mask: bool {s} or None; tokens that are False get no expert.
        experts_per_token: how many experts a token is sent to.
        first_expert: int32 [], where the logits are those of more experts than are at hand: which
            of them the first at hand is. None where they are the same.
    """

    logits: Tagged
    token_mask: Tagged | None
    experts_per_token: int = dataclasses.field(metadata={"static": True})
    first_expert: jax.Array | None = None

    def route(self, num_experts: int) -> Routing:
        """The routing, with ids of `num_experts` at hand, and `num_experts` for the others."""
        routing = route(self.logits, self.experts_per_token, token_mask=self.token_mask)
        first = self.first_expert
        return routing if first is None else own_pairs(routing, first, num_experts)


def is_supported(experts: Any, x: Tagged) -> bool:
    """Whether `expert_mlp` takes these experts and rows: a question of types, not of platform."""
    return (
        type(experts) is GptOssMLP
        and all(isinstance(w, TiledMXFP4) for w in (experts.gate_up, experts.down))
        and all(isinstance(b, Tagged) for b in (experts.gate_up_bias, experts.down_bias))
        and experts.activation.kind == "swiglu"
        and experts.activation.layout == "interleaved"
        and x.dtype == jnp.bfloat16
    )


def expert_mlp(
    experts: GptOssMLP,
    x: Tagged,
    routing: Routing | Logits,
    *,
    algorithm: str | None = None,
    implementation: str | None = None,
) -> Tagged:
    """Applies each token's experts and sums what they return, weighted.

    Args:
        experts: with tiled weights and an interleaved SwiGLU; see `is_supported`.
        x: bfloat16 {s, d}.
        routing: ids and weights {s, top_expert}, or the logits that they are to be made from. An
            id outside the experts stands for none.
        algorithm: of `dispatch.EXACT`, where it runs in XLA; None chooses by the sizes.
        implementation: see `lowering.per_platform`; "xla" for the dispatch, whose matmuls may be
            kernels.

    Returns:
        bfloat16 {s, d}. Tokens without an expert are zero. Products are summed in float32. The rows
        between the two matmuls are bfloat16, and in the kernels so are, above 1,024 pairs, the rows
        that a token's experts return, before those are summed in float32.

    Raises:
        TypeError: experts or rows are not supported.
        ValueError: sizes do not fit, or, on lowering, `implementation` does not fit the platform.
    """
    _check(experts, x, routing)
    if algorithm is None:
        algorithm = dispatch.choose_algorithm(
            x.size("s"), experts.gate_up.size("expert"), _experts_per_token(routing)
        )
    x, routing, experts = vary_together(x, routing, experts)
    if implementation == "xla":
        return _in_xla(experts, x, routing, algorithm)
    return _apply(experts, x.order("s", "d"), routing, algorithm, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _apply(
    experts: GptOssMLP,
    x: Tagged,
    routing: Routing | Logits,
    algorithm: str,
    implementation: str | None,
) -> Tagged:
    leaves, treedef = jax.tree.flatten((experts, x, routing))
    return _operation(*leaves, treedef=treedef, algorithm=algorithm, implementation=implementation)


def _forward(
    experts: GptOssMLP,
    x: Tagged,
    routing: Routing | Logits,
    algorithm: str,
    implementation: str | None,
) -> Any:
    return _apply(experts, x, routing, algorithm, implementation), (experts, x, routing)


def _backward(algorithm: str, implementation: str | None, saved: Any, gradient: Tagged) -> Any:
    del implementation
    experts, x, routing = saved
    biases = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}

    def function(biases: dict[str, Tagged], x: Tagged, routing: Routing | Logits) -> Tagged:
        return _in_xla(dataclasses.replace(experts, **biases), x, routing, algorithm)

    _, pullback = jax.vjp(function, biases, x, routing)
    of_biases, of_x, of_routing = pullback(gradient)
    weights = {
        name: jax.tree.map(no_gradient, getattr(experts, name)) for name in ("gate_up", "down")
    }
    return dataclasses.replace(experts, **weights, **of_biases), of_x, of_routing


_apply.defvjp(_forward, _backward)


def _in_xla(experts: GptOssMLP, x: Tagged, routing: Routing | Logits, algorithm: str) -> Tagged:
    num_experts = experts.gate_up.size("expert")
    if isinstance(routing, Logits):
        routing = routing.route(num_experts)
    return dispatch.EXACT[algorithm](experts, x, routing, num_experts)


def _in_triton(experts: GptOssMLP, x: Tagged, routing: Routing | Logits, algorithm: str) -> Tagged:
    del algorithm
    rows = x.untag("s", "d")
    if isinstance(routing, Logits):
        mask = routing.token_mask
        y = launch.routed_layer(
            experts,
            rows,
            routing.logits.untag("s", "expert"),
            None if mask is None else mask.untag("s"),
            routing.first_expert,
            routing.experts_per_token,
        )
    else:
        ids = routing.ids.untag("s", "top_expert").astype(jnp.int32)
        weights = routing.weights.untag("s", "top_expert").astype(jnp.float32)
        y = launch.layer(experts, rows, ids, weights)
    return Tagged(y, ("s", "d"))


def _on_leaves(function: Callable[..., Tagged]) -> Callable[..., Tagged]:
    """The function of a pytree's leaves, as primitives take them."""

    def call(*leaves: jax.Array, treedef: Any, algorithm: str) -> Tagged:
        return function(*jax.tree.unflatten(treedef, leaves), algorithm)

    return call


def _like(experts: GptOssMLP, x: Tagged, routing: Routing | Logits, algorithm: str) -> Tagged:
    """The shape of the result."""
    del experts, routing, algorithm
    return x


_operation = per_platform(
    "expert_mlp", _on_leaves(_in_xla), _on_leaves(_in_triton), _on_leaves(_like)
)


def _experts_per_token(routing: Routing | Logits) -> int:
    if isinstance(routing, Logits):
        return routing.experts_per_token
    return routing.ids.size("top_expert")


def _check(experts: GptOssMLP, x: Tagged, routing: Routing | Logits) -> None:
    if not is_supported(experts, x):
        raise TypeError(
            "expert_mlp takes a GptOssMLP with two TiledMXFP4 weights, biases and an interleaved "
            f"swiglu, and bfloat16 rows, got {type(experts).__name__} and rows of {x.dtype}"
        )
    num_experts, size = experts.gate_up.size("expert"), x.size("d")
    inner = experts.down.size("in")
    expected = {
        "gate_up": {"expert": num_experts, "out": 2 * inner, "in": size},
        "gate_up_bias": {"expert": num_experts, "out": 2 * inner},
        "down": {"expert": num_experts, "out": size, "in": inner},
        "down_bias": {"expert": num_experts, "out": size},
    }
    for name, sizes in expected.items():
        if getattr(experts, name).sizes != sizes:
            raise ValueError(
                f"{name} must have the sizes {sizes}, got {getattr(experts, name)} for rows {x}"
            )
    leaves = (
        (routing.logits, routing.token_mask)
        if isinstance(routing, Logits)
        else (routing.ids, routing.weights)
    )
    for leaf in leaves:
        if leaf is not None and leaf.size("s") != x.size("s"):
            raise ValueError(f"axis 's' has different sizes in rows {x} and routing {leaf}")
    if not isinstance(routing, Logits):
        if routing.ids.sizes != routing.weights.sizes:
            raise ValueError(
                f"ids and weights must have the same sizes, got {routing.ids} and {routing.weights}"
            )
    elif routing.first_expert is None and routing.logits.size("expert") != num_experts:
        raise ValueError(f"expected logits of {num_experts} experts, got {routing.logits}")

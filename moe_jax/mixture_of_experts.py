"""The mixture-of-experts layer as one function; `moe_jax.MoE` is the Flax module around it.

    y = mixture_of_experts(experts, x, gating, experts_per_token=4)

`x` and `gating` are `Tagged` {..., d} and {..., expert}, or bare arrays with those axes last. The
result is of the same kind as `x`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moe_jax import dispatch
from moe_jax.call import Call
from moe_jax.dispatch import BudgetPlan, Overflow, check_dispatch
from moe_jax.experts.base import check_experts
from moe_jax.kernels.expert_mlp.api import Logits, expert_mlp, is_supported
from moe_jax.routing import (
    LINEAR_ROUTER,
    Router,
    Routing,
    check_expert_axis,
    check_experts_per_token,
    check_groups,
    route,
)
from moe_jax.sharding.expert_parallel import OwnRows, expert_parallel
from moe_jax.sharding.mesh import Sharding
from moe_jax.tagged import Tagged, is_tagged, tag

type AlgorithmChoice = Literal["auto", "per_token", "dense", "grouped", "fixed_budget"]
type RemainingWeight = Literal["unused", "input"]
type Normalization = Literal["softmax", "linear"] | Router

_NORMALIZATIONS = {"softmax": Router(), "linear": LINEAR_ROUTER}


def mixture_of_experts(
    experts: Any,
    x: Any,
    gating: Any,
    *,
    experts_per_token: int,
    normalization: Normalization = "softmax",
    tokens_per_expert_ratio: float | None = None,
    algorithm: AlgorithmChoice = "auto",
    token_mask: Any = None,
    selection_bias: Any = None,
    mixing: Any = None,
    remaining_weight: RemainingWeight = "unused",
    overflow: Overflow = "reroute",
    with_report: bool = False,
    sharding: Sharding | None = None,
) -> Any:
    """Sends each token to its best experts and sums what they return, weighted.

    Args:
        experts: a pytree with an `expert` axis and a call; see `moe_jax.experts`.
        x: {..., d} floats.
        gating: {..., expert}, the router's logits (or, for `linear`, weights that are not negative)
            with the leading axes of `x`.
        experts_per_token: how many experts a token is sent to.
        normalization: `softmax` over the chosen logits, `linear`: gating divided by the sum over
            the chosen, or any `Router`.
        tokens_per_expert_ratio: None computes every chosen pair. A positive number allows
            `fixed_budget`: each expert then takes at most ratio x tokens x experts_per_token /
            experts tokens (rounded up to a multiple of 8). A token's result then depends on the
            other tokens.
        algorithm: `auto` chooses by the number of tokens, see `moe_jax.choose_algorithm`. One that
            is named is used; it never falls back to another. `grouped` has gradients but no
            forward-mode derivatives (`jax.jvp`); `dense` has both. On NVIDIA GPUs `auto` and
            `grouped` run kernels where gpt-oss experts are prepared (`moe_jax.prepare_experts`)
            and x is bfloat16; there `auto` has no forward-mode derivatives, whatever it chooses.
        token_mask: bool {...}; tokens that are False take no expert's room and get zeros.
        selection_bias: {expert}, added to what selects experts but not to what weighs them.
        mixing: {..., expert} floats: what weighs experts, where that is another tensor than
            `gating`, which then only selects; see `moe_jax.route`.
        remaining_weight: what becomes of 1 minus the sum of a token's weights. `unused`, or
            `input`: so much of the token's x is added, as BASE layers do with one expert and its
            sigmoid. A token without an expert then keeps its x. Experts and x are not rounded
            together, but one after the other.
        overflow: what `fixed_budget` does with tokens that found their expert full: `reroute` to
            lower-ranked experts with room, or `drop`.
        with_report: whether to return a `DispatchReport` as well.
        sharding: the devices over which the experts are spread; None for one, or inside
            `jax.shard_map`. `algorithm` is then what each device does with its own experts, and
            `auto` chooses by their number. Only `fixed_budget` is for all of them together: who
            takes which token is settled for all tokens and experts, and then each device computes
            its own pairs by an algorithm that `auto` chooses.

    Returns:
        {..., d} with the dtype of `x`, or that and the report.

    Raises:
        ValueError: axes or sizes do not fit, an option is unknown or contradicts another, or the
            experts cannot be split evenly over the devices.
        TypeError: a dtype is wrong, or `sharding` is not a `Sharding`.
    """
    router = _router(normalization)
    check_dispatch(algorithm, tokens_per_expert_ratio, overflow)
    layer = Call.of(experts, x, gating, "expert", token_mask)
    logits, num_experts = layer.per_token, layer.per_token.size("expert")
    mixing = _mixing(layer, mixing, token_mask)
    check_remaining_weight(remaining_weight)
    check_experts_per_token(experts_per_token, num_experts)
    check_groups(router, experts_per_token, num_experts)
    check_experts(layer.experts, num_experts)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"gating must be floats, got {logits.dtype}")
    bias = _selection_bias(selection_bias, num_experts)
    name = _algorithm(
        algorithm, layer.num_tokens, num_experts, experts_per_token, tokens_per_expert_ratio
    )
    compute = functools.partial(_compute, algorithm, name, layer, num_experts, sharding)
    if name == "fixed_budget":
        assert tokens_per_expert_ratio is not None  # _algorithm has checked it
        budget = dispatch.token_budget(
            layer.num_tokens, num_experts, experts_per_token, tokens_per_expert_ratio
        )
        plan = dispatch.plan_fixed_budget(
            logits,
            experts_per_token,
            budget,
            router,
            overflow=overflow,
            selection_bias=bias,
            token_mask=layer.mask,
        )
        y, routing = _planned(layer, plan, mixing, router, None if sharding is None else compute)
        report = plan.report
    else:
        y, routing = _exact(layer, experts_per_token, router, bias, mixing, compute)
        report = dispatch.exact_report(routing, num_experts, layer.mask)
    if remaining_weight == "input":
        y = dispatch.with_remaining(y, layer.x, routing, num_experts)
    y = layer.restore(y)
    return (y, report) if with_report else y


def fused_experts(
    hidden_states: Any,
    selected_experts: Any,
    scores: Any,
    experts: Any,
    *,
    algorithm: AlgorithmChoice = "auto",
    token_mask: Any = None,
    remaining_weight: RemainingWeight = "unused",
    sharding: Sharding | None = None,
) -> Any:
    """Applies experts where routing is done already; scores are used as they are.

    An id outside the experts stands for none: its pair adds nothing. An id that a token names
    twice counts twice.

    Args:
        hidden_states: {..., d} floats.
        selected_experts: int {..., top_expert}, with the leading axes of `hidden_states`.
        scores: float {..., top_expert}.
        experts: a pytree with an `expert` axis and a call.
        algorithm: `auto`, `per_token`, `dense` or `grouped`.
        token_mask: bool {...}; tokens that are False get zeros.
        remaining_weight: see `mixture_of_experts`; a pair that adds nothing has no weight.
        sharding: the devices over which the experts are spread, see `mixture_of_experts`.

    Returns:
        {..., d} with the dtype of `hidden_states`.

    Raises:
        ValueError: axes or sizes do not fit, the experts hold no arrays, or cannot be split evenly
            over the devices.
        TypeError: ids are not integers, scores not floats, or `sharding` is not a `Sharding`.
    """
    if algorithm == "fixed_budget":
        raise ValueError(
            "fused_experts computes every pair: algorithm 'fixed_budget' is not for it"
        )
    check_dispatch(algorithm, None, "reroute")
    check_remaining_weight(remaining_weight)
    layer = Call.of(experts, hidden_states, selected_experts, "top_expert", token_mask)
    other = Call.of(experts, hidden_states, scores, "top_expert", token_mask)
    ids, weights = layer.per_token, other.per_token
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"selected_experts must be integers, got {ids.dtype}")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"scores must be floats, got {weights.dtype}")
    if ids.sizes != weights.sizes:
        raise ValueError(
            f"selected_experts and scores must have the same sizes, got {ids} and {weights}"
        )
    num_experts = _count_experts(layer.experts)
    if layer.mask is not None:
        keep = layer.mask.array[:, None]
        ids = ids.map(lambda i: jnp.where(keep, i, num_experts))
    name = _algorithm(algorithm, layer.num_tokens, num_experts, ids.size("top_expert"), None)
    routing = Routing(ids.astype(jnp.int32), weights.astype(jnp.float32))
    y = _compute(algorithm, name, layer, num_experts, sharding, routing)
    if remaining_weight == "input":
        y = dispatch.with_remaining(y, layer.x, routing, num_experts)
    return layer.restore(y)


def check_remaining_weight(choice: Any) -> None:
    """Raises ValueError unless `choice` is one of the two."""
    if choice not in ("unused", "input"):
        raise ValueError(f"remaining_weight must be 'unused' or 'input', got {choice!r}")


def _router(normalization: Normalization) -> Router:
    if isinstance(normalization, Router):
        return normalization
    if normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"normalization must be one of {tuple(_NORMALIZATIONS)} or a Router, "
            f"got {normalization!r}"
        )
    return _NORMALIZATIONS[normalization]


def _algorithm(
    choice: str, num_tokens: int, num_experts: int, experts_per_token: int, ratio: float | None
) -> str:
    """The algorithm to use."""
    if choice == "auto":
        return dispatch.choose_algorithm(num_tokens, num_experts, experts_per_token, ratio)
    return choice


def _selection_bias(bias: Any, num_experts: int) -> Tagged | None:
    """{expert}, named if it was not."""
    if bias is None:
        return None
    named = bias if is_tagged(bias) else tag(bias, "expert")
    check_expert_axis("selection_bias", named, num_experts)
    return named


def _mixing(layer: Call, mixing: Any, token_mask: Any) -> Tagged | None:
    """`mixing` as rows {s, expert}."""
    if mixing is None:
        return None
    rows = Call.of(layer.experts, layer.like, mixing, "expert", token_mask).per_token
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise TypeError(f"mixing must be floats, got {rows.dtype}")
    if rows.sizes != layer.per_token.sizes:
        raise ValueError(f"mixing must have the sizes of gating {layer.per_token}, got {rows}")
    return rows


def _planned(
    layer: Call,
    plan: BudgetPlan,
    mixing: Tagged | None,
    router: Router,
    compute: Callable[[Routing], Tagged] | None,
) -> tuple[Tagged, Routing]:
    """What a plan makes of the rows: slot by slot or, given `compute`, pair by pair."""
    weighed = layer.per_token if mixing is None else mixing
    routing = dispatch.kept_pairs(weighed, plan, router)
    if compute is None:
        y = dispatch.fixed_budget(layer.experts, layer.x, weighed, plan, router)
    else:
        y = compute(routing)
    return dispatch.with_unknown(y, layer.per_token, weighed), routing


def _exact(
    layer: Call,
    experts_per_token: int,
    router: Router,
    bias: Tagged | None,
    mixing: Tagged | None,
    compute: Callable[[Routing, Logits | None], Tagged],
) -> tuple[Tagged, Routing]:
    """Routes, and computes every pair."""
    logits, mask = layer.per_token, layer.mask
    routing = route(
        logits, experts_per_token, router, selection_bias=bias, mixing=mixing, token_mask=mask
    )
    is_default = router == Router() and bias is None and mixing is None
    y = compute(routing, Logits(logits, mask, experts_per_token) if is_default else None)
    return y, routing


def _compute(
    choice: str,
    name: str,
    layer: Call,
    num_experts: int,
    sharding: Sharding | None,
    routing: Routing,
    unrouted: Logits | None = None,
) -> Tagged:
    """Computes every pair of `routing`, which is what `unrouted` becomes where it is given."""
    if sharding is None:
        return _on_one_device(choice, name, layer.experts, layer.x, routing, num_experts, unrouted)
    # a plan of fixed_budget is made here already: each device computes what is left of it
    chosen = "auto" if choice == "fixed_budget" else choice

    def on_each_device(experts: Any, own: OwnRows, count: int) -> Tagged:
        routing = own.routing
        name = _algorithm(chosen, own.x.size("s"), count, routing.ids.size("top_expert"), None)
        logits = None
        if unrouted is not None and own.per_row is not None:
            of_rows, mask = own.per_row
            logits = Logits(
                Tagged(of_rows, ("s", "expert")),
                Tagged(mask, ("s",)),
                unrouted.experts_per_token,
                own.first_expert,
            )
        return _on_one_device(chosen, name, experts, own.x, routing, count, logits)

    per_row = ()
    if unrouted is not None:
        logits, mask = unrouted.logits.untag("s", "expert"), unrouted.token_mask
        # a mask in any case: rows that are filled up go to no expert
        per_row = logits, jnp.ones(len(logits), bool) if mask is None else mask.untag("s")
    return expert_parallel(
        on_each_device, layer.experts, layer.x, routing, num_experts, sharding, per_row
    )


def _on_one_device(
    choice: str,
    name: str,
    experts: Any,
    x: Tagged,
    routing: Routing,
    num_experts: int,
    unrouted: Logits | None = None,
) -> Tagged:
    """Where there are kernels for the whole layer, they stand for `grouped`."""
    if choice in ("auto", "grouped") and is_supported(experts, x):
        return expert_mlp(experts, x, unrouted or routing, algorithm=name)
    return dispatch.EXACT[name](experts, x, routing, num_experts)


def _count_experts(experts: Any) -> int:
    """The number of experts, from the first array of the experts."""
    leaves = jax.tree.leaves(experts, is_leaf=is_tagged)
    if not leaves:
        raise ValueError("the experts hold no arrays, so that their number is unknown")
    first = leaves[0]
    count = first.size("expert") if is_tagged(first) else jnp.shape(first)[0]
    check_experts(experts, count)
    return count

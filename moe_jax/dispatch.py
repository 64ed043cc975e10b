"""How rows travel to experts and back.

Three algorithms compute the same function and differ in what they cost:

    per_token   gathers the weights of the chosen experts, row by row. Reads
                tokens x experts_per_token experts: best for a token or a few.
    dense       runs every expert on every token and keeps what was chosen. No gather of rows at
                all: best where most experts are chosen anyway. An expert that overflows on a token
                that did not choose it leaves the result alone, but makes gradients NaN.
    grouped     sorts (token, expert) pairs by expert and multiplies group by group. Multiplies
                only what was chosen and reads each expert once: best for many tokens. Has
                gradients, but no forward-mode derivatives. The kernels for NVIDIA GPUs
                (`moe_jax.kernels.expert_mlp`) compute it so for any number of tokens.

The fourth computes another function:

    fixed_budget  every expert takes at most a fixed number of tokens, the ones that want it most
                  (expert choice, https://arxiv.org/abs/2202.09368, restricted to the tokens'
                  preferences). All shapes are known beforehand, but what a token gets depends on
                  the other tokens, later ones too: it is not causal. It runs only when asked for.

`choose_algorithm` is a pure function of sizes; without a budget it chooses among the first three,
so that the number of tokens never changes what a model computes.
"""

import dataclasses
import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moe_jax.dtypes import accumulator
from moe_jax.experts.base import apply_experts
from moe_jax.experts.rows import ChosenExperts, EveryExpert, SortedRows
from moe_jax.routing import (
    Router,
    Routing,
    expert_scores,
    has_nan,
    routing_weights,
    selection_scores,
)
from moe_jax.tagged import Tagged

type Algorithm = Literal["per_token", "dense", "grouped", "fixed_budget"]
type Overflow = Literal["reroute", "drop"]

ALGORITHMS = ("per_token", "dense", "grouped", "fixed_budget")
_BUDGET_MULTIPLE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchReport:
    """What became of the (token, expert) pairs that routing chose; int32 scalars.

    Attributes:
        assigned: pairs computed.
        rerouted: those of them whose expert is not among the token's best `experts_per_token`.
        dropped: pairs of the token's best `experts_per_token` that were not computed.
        empty_tokens: tokens (not masked) for which no expert computed anything.
    """

    assigned: jax.Array
    rerouted: jax.Array
    dropped: jax.Array
    empty_tokens: jax.Array


def choose_algorithm(
    num_tokens: int,
    num_experts: int,
    experts_per_token: int,
    tokens_per_expert_ratio: float | None = None,
) -> Algorithm:
    """The algorithm for so many tokens.

    Without a ratio: `per_token` while the pairs are no more than the experts, so that no expert is
    read twice on average; then `dense` where at least half of the experts are chosen, else
    `grouped`. With a ratio: `per_token` for one token, `fixed_budget` where the budget is at most
    two thirds of the tokens, else `dense`.
    """
    if tokens_per_expert_ratio is not None:
        budget = token_budget(num_tokens, num_experts, experts_per_token, tokens_per_expert_ratio)
        if num_tokens <= 1:
            return "per_token"
        return "fixed_budget" if 3 * budget <= 2 * num_tokens else "dense"
    if num_tokens * experts_per_token <= num_experts:
        return "per_token"
    return "dense" if 2 * experts_per_token >= num_experts else "grouped"


def token_budget(
    num_tokens: int, num_experts: int, experts_per_token: int, tokens_per_expert_ratio: float
) -> int:
    """How many tokens an expert takes: `ratio` times the mean, rounded up to a multiple of 8.

    Raises:
        ValueError: the ratio is not a positive finite number.
    """
    check_ratio(tokens_per_expert_ratio)
    mean = num_tokens * experts_per_token / num_experts
    budget = -(-math.ceil(tokens_per_expert_ratio * mean) // _BUDGET_MULTIPLE) * _BUDGET_MULTIPLE
    return min(num_tokens, budget)


def per_token(experts: Any, x: Tagged, routing: Routing, num_experts: int) -> Tagged:
    """x {s, d}, routing {s, top_expert} -> {s, d}."""
    ids, weights, valid = valid_pairs(routing, num_experts)
    rows = Tagged(
        jnp.broadcast_to(x.untag("s", "d")[:, None, :], (*ids.shape, x.size("d"))),
        ("s", "top_expert", "d"),
    )
    y = apply_experts(experts, rows, ChosenExperts(ids))
    return _combine(y, weights, valid, "top_expert", x.dtype)


def dense(experts: Any, x: Tagged, routing: Routing, num_experts: int) -> Tagged:
    """x {s, d}, routing {s, top_expert} -> {s, d}."""
    ids, weights, valid = valid_pairs(routing, num_experts)
    chosen = jax.nn.one_hot(ids.array, num_experts, dtype=jnp.bool_) & valid.array[:, :, None]
    gates = jnp.where(chosen, weights.array[:, :, None], 0.0).sum(1)
    y = apply_experts(experts, x, EveryExpert())
    if "expert" not in y.axes:
        y = Tagged(jnp.broadcast_to(y.array, (num_experts, *y.shape)), ("expert", *y.axes))
    return _combine(
        y, Tagged(gates, ("s", "expert")), Tagged(chosen.any(1), ("s", "expert")), "expert", x.dtype
    )


def grouped(experts: Any, x: Tagged, routing: Routing, num_experts: int) -> Tagged:
    """x {s, d}, routing {s, top_expert} -> {s, d}."""
    ids, weights, valid = valid_pairs(routing, num_experts)
    pair_ids = jnp.where(valid.array, ids.array, num_experts).reshape(-1)
    order = jnp.argsort(pair_ids, stable=True)
    sorted_ids = pair_ids[order]
    group_sizes = jax.nn.one_hot(sorted_ids, num_experts, dtype=jnp.int32).sum(0)
    token = Tagged(order // max(1, ids.size("top_expert")), ("row",))
    rows = SortedRows(Tagged(sorted_ids, ("row",)), Tagged(group_sizes, ("expert",)))
    y = apply_experts(experts, x.take(token, "s"), rows)
    back = Tagged(jnp.argsort(order).reshape(ids.shape), ("s", "top_expert"))
    return _combine(y.take(back, "row"), weights, valid, "top_expert", x.dtype)


EXACT = {"per_token": per_token, "dense": dense, "grouped": grouped}
"""The algorithms that compute every chosen pair."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """Who computes what under a fixed budget.

    Attributes:
        slot_token: int32 {expert, slot}, the token in each slot; the number of tokens if empty.
        ids: int32 {s, top_expert}, the experts a token keeps, best first.
        valid: bool {s, top_expert}, whether there is such an expert.
        slot: int32 {s, top_expert}, the token's slot with that expert.
        report: counts.
    """

    slot_token: Tagged
    ids: Tagged
    valid: Tagged
    slot: Tagged
    report: DispatchReport


def plan_fixed_budget(
    logits: Tagged,
    experts_per_token: int,
    budget: int,
    router: Router,
    *,
    overflow: Overflow = "reroute",
    selection_bias: Tagged | None = None,
    token_mask: Tagged | None = None,
) -> BudgetPlan:
    """Lets each expert choose at most `budget` tokens, and each token at most its best experts.

    An expert prefers tokens that rank it higher, among those the ones with the higher score, then
    the earlier ones. With `overflow="drop"` it takes only tokens that have it among their best
    `experts_per_token`. With `reroute` free slots go to tokens that rank it lower; a token that
    lost a better expert then keeps it in place. No token keeps more than `experts_per_token`.
    """
    check_overflow(overflow)
    scores = selection_scores(logits, router, selection_bias).untag("s", "expert")
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    num_tokens, num_experts = scores.shape
    rank = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)
    tokens = jnp.ones(num_tokens, bool) if token_mask is None else token_mask.untag("s")
    eligible = tokens[:, None] & (scores > -jnp.inf)
    wanted = eligible & (rank < experts_per_token)
    if overflow == "drop":
        eligible = wanted

    priority = expert_scores(logits, router).untag("s", "expert")
    token = jax.lax.broadcasted_iota(jnp.int32, rank.shape, 0)
    _, _, order = jax.lax.sort(
        (jnp.where(eligible, rank, num_experts), -priority, token), dimension=0, num_keys=2
    )
    place = jnp.argsort(order, axis=0).astype(jnp.int32)
    held = eligible & (place < budget)
    slot_token = jnp.where(
        jnp.take_along_axis(held, order[:budget], axis=0), order[:budget], num_tokens
    )
    best, ids = jax.lax.top_k(jnp.where(held, -rank, -num_experts), experts_per_token)
    valid = best > -num_experts
    kept = jnp.minimum(-best, num_experts)
    assigned = valid.sum(dtype=jnp.int32)
    rerouted = (valid & (kept >= experts_per_token)).sum(dtype=jnp.int32)
    report = DispatchReport(
        assigned=assigned,
        rerouted=rerouted,
        dropped=wanted.sum(dtype=jnp.int32) - (assigned - rerouted),
        empty_tokens=(tokens & ~valid.any(1)).sum(dtype=jnp.int32),
    )
    pairs = ("s", "top_expert")
    return BudgetPlan(
        slot_token=Tagged(slot_token.T, ("expert", "slot")),
        ids=Tagged(ids.astype(jnp.int32), pairs),
        valid=Tagged(valid, pairs),
        slot=Tagged(jnp.take_along_axis(place, ids, axis=1), pairs),
        report=report,
    )


def check_dispatch(algorithm: str, ratio: float | None, overflow: str) -> None:
    """Raises ValueError for an unknown or contradictory choice of dispatch."""
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be 'auto' or one of {ALGORITHMS}, got {algorithm!r}")
    if algorithm == "fixed_budget" and ratio is None:
        raise ValueError("algorithm 'fixed_budget' needs tokens_per_expert_ratio, got None")
    if ratio is not None:
        check_ratio(ratio)
        if algorithm not in ("auto", "fixed_budget"):
            raise ValueError(
                f"tokens_per_expert_ratio is for 'auto' and 'fixed_budget': {algorithm!r} computes "
                f"every chosen pair. Leave one of them out"
            )
    check_overflow(overflow)


def check_ratio(ratio: float) -> None:
    """Raises ValueError unless the ratio is a positive finite number."""
    number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
    if not (number and math.isfinite(ratio) and ratio > 0):
        raise ValueError(
            f"tokens_per_expert_ratio must be a positive number, got {ratio!r}; "
            f"leave it None to compute every chosen pair"
        )


def check_overflow(overflow: str) -> None:
    """Raises ValueError unless `overflow` is one of the two policies."""
    if overflow not in ("reroute", "drop"):
        raise ValueError(f"overflow must be 'reroute' or 'drop', got {overflow!r}")


def fixed_budget(
    experts: Any, x: Tagged, logits: Tagged, plan: BudgetPlan, router: Router
) -> Tagged:
    """x {s, d}, logits {s, expert} -> {s, d}, weighed among the kept experts."""
    if not x.size("s"):
        return x
    weights = routing_weights(logits.astype(jnp.float32), plan.ids, plan.valid, router)
    y = apply_experts(experts, x.take(plan.slot_token, "s"), EveryExpert())
    budget = plan.slot_token.size("slot")
    place = plan.ids.array * budget + jnp.minimum(plan.slot.array, budget - 1)
    y = y.order("expert", "slot", "d").merge(("expert", "slot"), "place")
    y = y.take(Tagged(place, ("s", "top_expert")), "place")
    return with_unknown(_combine(y, weights, plan.valid, "top_expert", x.dtype), logits)


def kept_pairs(logits: Tagged, plan: BudgetPlan, router: Router) -> Routing:
    """What a plan leaves, as a routing: computing each of its pairs is what `fixed_budget` does.

    Its result still needs `with_unknown`.
    """
    weights = routing_weights(logits.astype(jnp.float32), plan.ids, plan.valid, router)
    ids = plan.ids.map(lambda i: jnp.where(plan.valid.array, i, logits.size("expert")))
    return Routing(ids, weights)


def with_unknown(y: Tagged, *logits: Tagged) -> Tagged:
    """Rows {s, d}, NaN where a logit is: it must show even where its expert had no room."""
    unknown = has_nan(*logits).untag("s")[:, None]
    return y.map(lambda array: jnp.where(unknown, jnp.nan, array))


def with_remaining(y: Tagged, x: Tagged, routing: Routing, num_experts: int) -> Tagged:
    """y {s, d} and as much of x {s, d} as the weights of each token leave of 1.

    The sum is taken in float32 at least, and has the dtype of y.
    """
    wide = accumulator(y.dtype)
    used = valid_pairs(routing, num_experts)[1].sum("top_expert").untag("s").astype(wide)
    rest = (1 - used)[:, None] * x.untag("s", "d").astype(wide)
    total = y.untag("s", "d").astype(wide) + rest
    return Tagged(total.astype(y.dtype), ("s", "d"))


def exact_report(
    routing: Routing, num_experts: int, token_mask: Tagged | None = None
) -> DispatchReport:
    """The report of an algorithm that computes every chosen pair."""
    valid = valid_pairs(routing, num_experts)[2].array
    empty = ~valid.any(1)
    if token_mask is not None:
        empty &= token_mask.untag("s")
    zero = jnp.zeros((), jnp.int32)
    return DispatchReport(valid.sum(dtype=jnp.int32), zero, zero, empty.sum(dtype=jnp.int32))


def valid_pairs(routing: Routing, num_experts: int) -> tuple[Tagged, Tagged, Tagged]:
    """Ids within range, weights, and whether the pair names an expert, all {s, top_expert}.

    The weight of a pair that names none is 0, whatever it was.
    """
    ids, weights = routing.ids.order("s", "top_expert"), routing.weights.order("s", "top_expert")
    valid = ids.map(lambda i: (i >= 0) & (i < num_experts))
    weights = weights.map(lambda w: jnp.where(valid.array, w, 0.0))
    return ids.map(lambda i: jnp.clip(i, 0, num_experts - 1)), weights, valid


def _combine(y: Tagged, weights: Tagged, valid: Tagged, axis: str, dtype: Any) -> Tagged:
    """The weighted sum over `axis`, in float32 at least. What is not valid is nothing, even NaN."""
    wide = accumulator(dtype)
    rows = y.order("s", axis, "d").array.astype(wide)
    rows = jnp.where(valid.order("s", axis).array[:, :, None], rows, 0.0)
    total = (rows * weights.order("s", axis).array.astype(wide)[:, :, None]).sum(1)
    return Tagged(total.astype(dtype), ("s", "d"))

"""Which experts a token goes to, and with what weights.

A router is data: `Router` says how logits become scores, whether the scores are taken before or
after the top-k, and whether the chosen weights are renormalised. Everything is computed in float32.

References:
    gpt-oss: softmax over the chosen logits. https://arxiv.org/abs/2508.10925
    Mixtral: the same. https://arxiv.org/abs/2401.04088
    DeepSeek-V2, V3: group-limited selection, sigmoid scores, a bias that only selects.
        https://arxiv.org/abs/2405.04434, https://arxiv.org/abs/2412.19437
    BASE layers: centroids, one expert, sigmoid. https://arxiv.org/abs/2103.16716
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moe_jax.tagged import Tagged


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Router:
    """How logits become routing weights.

    Attributes:
        score: `softmax` over experts, `sigmoid` of each, or `linear`: the gating itself, which
            must not be negative (a token with a negative chosen gating gets NaN), but may be -inf.
        order: `after_top_k` selects by the logits and scores the chosen ones;
            `before_top_k` scores all experts and selects by score.
        renormalize: whether the chosen weights are divided by their sum.
        scale: a factor on the weights.
        num_groups: experts are split into this many equal groups, in order ...
        groups_per_token: ... and a token may only use experts of its best groups.
        group_score: a group's worth: its best expert (`max`) or its best two (`top2_sum`).
    """

    score: Literal["softmax", "sigmoid", "linear"] = "softmax"
    order: Literal["after_top_k", "before_top_k"] = "after_top_k"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2_sum"] = "max"

    def __post_init__(self) -> None:
        _check_choice("score", self.score, ("softmax", "sigmoid", "linear"))
        _check_choice("order", self.order, ("after_top_k", "before_top_k"))
        _check_choice("group_score", self.group_score, ("max", "top2_sum"))
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"groups_per_token must be between 1 and num_groups={self.num_groups}, "
                f"got {self.groups_per_token}"
            )


LINEAR_ROUTER = Router(score="linear", renormalize=True)
"""Non-negative gating, divided by the sum over the chosen experts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The outcome of routing.

    Attributes:
        ids: int32 {..., top_expert}. An id outside the experts stands for none.
        weights: float32 {..., top_expert}.
    """

    ids: Tagged
    weights: Tagged


def router_logits(x: Tagged, weight: Tagged, bias: Tagged | None = None) -> Tagged:
    """Logits {..., expert} in float32 of x {..., d}, weight {expert, d} and bias {expert}.

    Without a bias the rows of `weight` are centroids, and the logits are affinities.
    """
    logits = x.astype(jnp.float32).dot(
        weight.astype(jnp.float32), "d", precision=jax.lax.Precision.HIGHEST
    )
    return logits if bias is None else logits + bias.astype(jnp.float32)


def route(
    logits: Tagged,
    experts_per_token: int,
    router: Router = Router(),  # noqa: B008 - frozen
    *,
    selection_bias: Tagged | None = None,
    mixing: Tagged | None = None,
    token_mask: Tagged | None = None,
) -> Routing:
    """Chooses experts and weighs them.

    Of equal logits the expert with the lowest index wins. An expert is barred by a logit of -inf or
    by its group: where too few others are left, its id is `num_experts` and its weight 0. A NaN
    among the logits, or in `mixing`, makes the token's weights NaN.

    Args:
        logits: {..., expert}, any float type.
        experts_per_token: how many experts a token is sent to.
        router: how logits become weights.
        selection_bias: {expert}; added to what selects, not to what weighs.
        mixing: {..., expert}; what becomes weights, where that is another tensor than the logits,
            which then only select. The router's score applies to both: for weights that are used
            as they are, or divided by their sum, it is `linear`.
        token_mask: bool {...}; tokens that are False get no expert: id `num_experts`, weight 0.

    Returns:
        Routing with ids and weights {..., top_expert}, best first.

    Raises:
        ValueError: sizes or axes do not fit.
    """
    num_experts = logits.size("expert")
    check_experts_per_token(experts_per_token, num_experts)
    check_groups(router, experts_per_token, num_experts)
    logits = _seen(logits, token_mask)
    weighed = logits if mixing is None else _seen(_like(mixing, logits), token_mask)
    values, ids = selection_scores(logits, router, selection_bias).top_k(
        experts_per_token, "expert", "top_expert"
    )
    # a NaN with its sign set ranks last, so that top_k may not choose it
    rest = tuple(n for n in ids.axes if n != "top_expert")
    unknown = has_nan(logits, weighed).untag(*rest)[..., None]
    valid = values.map(lambda v: (v > -jnp.inf) | unknown)
    weights = routing_weights(weighed, ids, valid, router)
    weights = weights.map(lambda w: jnp.where(unknown, jnp.nan, w))
    ids = ids.map(lambda i: jnp.where(valid.array, i, num_experts))
    if token_mask is not None:
        keep = token_mask.expand_to(ids)
        ids = ids.map(lambda i: jnp.where(keep, i, num_experts))
        weights = weights.map(lambda w: jnp.where(keep, w, 0.0))
    return Routing(ids, weights)


def selection_scores(
    logits: Tagged, router: Router, selection_bias: Tagged | None = None
) -> Tagged:
    """What experts are selected by, {..., expert}; -inf for experts that are barred.

    Those are experts whose logit is -inf, whatever their score and bias, and experts of groups that
    were not chosen. In float32; no zero has its sign set.
    """
    logits = logits.astype(jnp.float32)
    scores = logits if router.order == "after_top_k" else expert_scores(logits, router)
    if selection_bias is not None:
        scores = scores + selection_bias.astype(jnp.float32)
    barred = logits.order(*scores.axes).array == -jnp.inf
    scores = scores.map(lambda array: jnp.where(barred, -jnp.inf, _one_zero(array)))
    return scores if router.num_groups == 1 else _limit_groups(scores, router)


def expert_scores(logits: Tagged, router: Router) -> Tagged:
    """The router's score of every expert, float32 {..., expert}."""
    rest = tuple(n for n in logits.axes if n != "expert")
    ordered = logits.astype(jnp.float32).order(*rest, "expert")
    return ordered.map(lambda array: _score(array, None, router))


def routing_weights(logits: Tagged, ids: Tagged, valid: Tagged | None, router: Router) -> Tagged:
    """Weights {..., top_expert} of the experts `ids`; 0 where `valid` is False."""
    rest = tuple(n for n in ids.axes if n != "top_expert")
    index = ids.untag(*rest, "top_expert")
    mask = None if valid is None else valid.untag(*rest, "top_expert")
    source = logits.untag(*rest, "expert")
    if router.order == "after_top_k":
        weights = _score(jnp.take_along_axis(source, index, axis=-1), mask, router)
    else:
        weights = jnp.take_along_axis(_score(source, None, router), index, axis=-1)
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
    if router.score == "linear":
        barred = weights == -jnp.inf
        weights = jnp.where(barred, 0.0, jnp.where(weights < 0, jnp.nan, weights))
    if router.renormalize:
        total = weights.sum(-1, keepdims=True)
        empty = total == 0
        weights = jnp.where(empty, 0.0, weights / jnp.where(empty, 1.0, total))
    return Tagged(weights * router.scale, (*rest, "top_expert"))


def has_nan(*values: Tagged) -> Tagged:
    """Whether any expert's number is NaN in one of `values` {..., expert}; bool {...}."""
    rest = tuple(n for n in values[0].axes if n != "expert")
    found = [jnp.isnan(value.untag(*rest, "expert")).any(-1) for value in values]
    return Tagged(functools.reduce(jnp.logical_or, found), rest)


def own_pairs(routing: Routing, first_expert: jax.Array, num_experts: int) -> Routing:
    """The routing as it is for `num_experts` experts from `first_expert` on.

    Ids count from that expert; those of other experts become `num_experts`, which stands for none.
    """
    ids = routing.ids.map(lambda i: i - first_expert)
    own = ids.map(lambda i: jnp.where((i >= 0) & (i < num_experts), i, num_experts))
    return Routing(own, routing.weights)


def check_experts_per_token(experts_per_token: Any, num_experts: int) -> None:
    """Raises TypeError or ValueError unless it is an int between 1 and `num_experts`."""
    if not isinstance(experts_per_token, int) or isinstance(experts_per_token, bool):
        raise TypeError(f"experts_per_token must be an int, got {experts_per_token!r}")
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(
            f"experts_per_token must be between 1 and the number of experts {num_experts}, "
            f"got {experts_per_token}"
        )


def check_expert_axis(name: str, value: Tagged, num_experts: int) -> None:
    """Raises ValueError unless `value` is {expert} with one entry for each expert."""
    if value.axes != ("expert",) or value.size("expert") != num_experts:
        raise ValueError(f"{name} must be {{expert={num_experts}}}, got {value}")


def check_groups(router: Router, experts_per_token: int, num_experts: int) -> None:
    """Raises ValueError unless the groups are equal and hold `experts_per_token` experts."""
    if num_experts % router.num_groups:
        raise ValueError(
            f"num_groups={router.num_groups} must divide the number of experts {num_experts}"
        )
    allowed = num_experts // router.num_groups * router.groups_per_token
    if experts_per_token > allowed:
        raise ValueError(
            f"experts_per_token={experts_per_token} is more than the {allowed} experts in "
            f"groups_per_token={router.groups_per_token} of num_groups={router.num_groups} groups"
        )


def _seen(values: Tagged, token_mask: Tagged | None) -> Tagged:
    """Values {..., expert} in float32, 0 for masked tokens.

    Before the scores, so that a NaN in a masked token does not reach the gradients.
    """
    values = values.astype(jnp.float32)
    if token_mask is None:
        return values
    seen = token_mask.expand_to(values)
    return values.map(lambda array: jnp.where(seen, array, 0.0))


def _like(mixing: Tagged, logits: Tagged) -> Tagged:
    """`mixing`, after a check that it has the axes and sizes of the logits."""
    if mixing.sizes != logits.sizes:
        raise ValueError(
            f"mixing must have the axes and sizes of the logits {logits}, got {mixing}"
        )
    return mixing


def _score(values: jax.Array, valid: jax.Array | None, router: Router) -> jax.Array:
    """Scores over the last axis, 0 where not `valid`."""
    if router.score == "softmax":
        if valid is not None:
            values = jnp.where(valid, values, -jnp.inf)
        return _softmax(values)
    scores = jax.nn.sigmoid(values) if router.score == "sigmoid" else values
    return scores if valid is None else jnp.where(valid, scores, 0.0)


def _one_zero(scores: jax.Array) -> jax.Array:
    """Float32 scores with 0 for -0, which top_k takes to be less than 0.

    Bits are compared, for numbers near zero may count as zero in a comparison of floats.
    """
    negative = jax.lax.bitcast_convert_type(scores, jnp.int32) == jnp.iinfo(jnp.int32).min
    return jnp.where(negative, 0.0, scores)


def _softmax(values: jax.Array) -> jax.Array:
    """Softmax over the last axis; 0, with gradient 0, where all are -inf."""
    empty = (values == -jnp.inf).all(-1, keepdims=True)
    return jnp.where(empty, 0.0, jax.nn.softmax(jnp.where(empty, 0.0, values), axis=-1))


def _limit_groups(scores: Tagged, router: Router) -> Tagged:
    """Sets scores outside the best groups of each token to -inf."""
    rest = tuple(n for n in scores.axes if n != "expert")
    grouped = scores.order(*rest, "expert").split("expert", group=router.num_groups, member=-1)
    size = grouped.size("member")
    count = 1 if router.group_score == "max" else min(2, size)
    worth = grouped.top_k(count, "member", "best")[0].sum("best")
    _, best = worth.top_k(router.groups_per_token, "group", "chosen")
    allowed = jax.nn.one_hot(best.array, router.num_groups, dtype=jnp.bool_).any(-2)
    limited = jnp.where(allowed[..., None], grouped.array, -jnp.inf)
    return Tagged(limited, grouped.axes).merge(("group", "member"), "expert")

"""Balanced routing: every expert gets as many tokens, and the sum of scores is the greatest.

BASE layers train so (https://arxiv.org/abs/2103.16716): no loss has to keep the load even. It is a
linear assignment problem, solved here by an auction (Bertsekas, https://doi.org/10.1007/BF02186476,
and for places that are alike Bertsekas and Castanon, https://doi.org/10.1007/BF02216783):

    Every expert has so many places, and a price. In each round every token without a place bids
    for the expert where its score minus the price is greatest, as much as makes its next best
    expert as good, and `eps` more. Each expert keeps its highest bids, old and new; once it is
    full, the lowest that it holds is its price.

When all tokens have a place, none could gain more than `eps` elsewhere at these prices, so that the
sum of scores is within tokens x eps of the greatest there is. To get there fast, the auction is
held with a large `eps` first; only its prices are kept for the next, four times finer.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing import Router, Routing, routing_weights
from moe_jax.tagged import Tagged

_COARSEST = 0.25
_FINER = 0.25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which expert each token got.

    Attributes:
        ids: int32 {s}; the number of experts for tokens without one, which are the masked ones.
        rounds: int32 scalar, how many rounds of bids were held.
        tolerance: float32 scalar, the one that was reached. More than was asked for where the
            rounds were used up; infinite where they did not suffice for the first auction, so that
            tokens got what was left.
    """

    ids: Tagged
    rounds: jax.Array
    tolerance: jax.Array


def balanced_assignment(
    scores: Tagged,
    *,
    token_mask: Tagged | None = None,
    tolerance: float = 1e-4,
    max_rounds: int = 10_000,
) -> Assignment:
    """Gives each token one expert, so that experts have equally many and the scores' sum is large.

    With n tokens that are not masked, no expert gets more than ceil(n / experts): n / experts each
    where that is whole. The sum of scores is at most tolerance x m x (greatest - least score) below
    the greatest sum possible, with m = experts x ceil(n / experts), up to rounding in float32. A
    round takes time in proportion to tokens x experts; there were 70 to 1,100 for 512 tokens and 16
    experts, 500 to 2,000 for 4,096 and 64, the more the more alike the tokens are. The result is a
    constant to differentiation.

    Args:
        scores: {s, expert} floats. What is not finite counts as the least finite score.
        token_mask: bool {s}; tokens that are False get no expert and do not count.
        tolerance: between 1e-6, which is about what float32 resolves, and 1.
        max_rounds: how many rounds there may be. Counts are equal also where they do not suffice.

    Raises:
        ValueError: axes or sizes do not fit, or an option is out of range.
    """
    if not 1e-6 <= tolerance <= 1:
        raise ValueError(f"tolerance must be between 1e-6 and 1, got {tolerance}")
    if max_rounds < 0:
        raise ValueError(f"max_rounds must not be negative, got {max_rounds}")
    array = jax.lax.stop_gradient(scores.untag("s", "expert").astype(jnp.float32))
    num_tokens, num_experts = array.shape
    if not num_experts:
        raise ValueError(f"there are no experts in {scores}")
    real = jnp.ones(num_tokens, bool) if token_mask is None else token_mask.untag("s")
    if real.shape != (num_tokens,):
        raise ValueError(f"token_mask must be {{s={num_tokens}}}, got {token_mask}")
    values, bidders, places = _filled_up(_from_zero_to_one(array, real), real, num_experts)
    auction = _hold(values, bidders, places, tolerance, max_rounds)
    owner = _settle(auction.settled, bidders, places, num_experts)[:num_tokens]
    return Assignment(
        Tagged(jnp.where(real, owner, num_experts), ("s",)), auction.rounds, auction.reached
    )


def route_balanced(
    logits: Tagged,
    router: Router = Router(score="sigmoid"),  # noqa: B008 - frozen
    *,
    token_mask: Tagged | None = None,
    tolerance: float = 1e-4,
    max_rounds: int = 10_000,
) -> Routing:
    """One expert for each token as `balanced_assignment` gives it, weighed as the router says.

    All tokens of all token axes are assigned together. Who gets which expert has no gradient, the
    weights have. A token whose logits hold a NaN gets an expert and the weight NaN.

    Args:
        logits: {..., expert}: the scores, whose sum is made large.
        router: how the logit of the expert that a token got becomes its weight. There must be no
            groups.
        token_mask: bool {...}; tokens that are False get id `num_experts` and weight 0.
        tolerance: see `balanced_assignment`.
        max_rounds: see `balanced_assignment`.

    Returns:
        Routing {..., top_expert=1}, for `moe_jax.fused_experts`.

    Raises:
        ValueError: axes or sizes do not fit, or an option is out of range.
    """
    if router.num_groups != 1:
        raise ValueError(f"balanced routing has no groups, got num_groups={router.num_groups}")
    rest = tuple(n for n in logits.axes if n != "expert")
    ordered = logits.order(*rest, "expert").astype(jnp.float32)
    sizes, num_experts = ordered.shape[:-1], ordered.shape[-1]
    if token_mask is not None:
        keep = token_mask.expand_to(ordered)
        ordered = ordered.map(lambda array: jnp.where(keep, array, 0.0))
        token_mask = Tagged(token_mask.untag(*rest).reshape(-1), ("s",))
    rows = Tagged(ordered.array.reshape(math.prod(sizes), num_experts), ("s", "expert"))
    found = balanced_assignment(
        rows, token_mask=token_mask, tolerance=tolerance, max_rounds=max_rounds
    )
    ids = Tagged(found.ids.array.reshape(*sizes, 1), (*rest, "top_expert"))
    valid = ids.map(lambda i: i < num_experts)
    unknown = jnp.isnan(ordered.array).any(-1, keepdims=True)
    weights = routing_weights(ordered, ids, valid, router)
    return Routing(ids, weights.map(lambda w: jnp.where(unknown, jnp.nan, w)))


class _Auction(NamedTuple):
    """The state of an auction; `bidder` are tokens and what fills them up.

    Attributes:
        owner: int32 [bidder], the expert that a bidder has a place with; their number for none.
        bid: float32 [bidder], what it bid for that place.
        price: float32 [expert].
        eps: float32 scalar.
        rounds: int32 scalar.
        open: bool scalar, whether somebody has no place yet.
        settled: int32 [bidder], `owner` at the end of the last auction in which all got a place.
        reached: float32 scalar, its eps; infinite before.
    """

    owner: jax.Array
    bid: jax.Array
    price: jax.Array
    eps: jax.Array
    rounds: jax.Array
    open: jax.Array
    settled: jax.Array
    reached: jax.Array


def _from_zero_to_one(scores: jax.Array, real: jax.Array) -> jax.Array:
    """Scores [s, expert] with the least at 0 and the greatest at 1; 0 where all are equal."""
    known = jnp.isfinite(scores) & real[:, None]
    scores = jnp.where(known, scores, 0.0)
    # by a power of two first: the reciprocal of a large range could be no number of full precision
    _, exponent = jnp.frexp(jnp.abs(scores).max(initial=0.0))
    scores = jnp.ldexp(scores, -exponent)
    least = jnp.where(known, scores, jnp.inf).min(initial=jnp.inf)
    span = jnp.where(known, scores, -jnp.inf).max(initial=-jnp.inf) - least
    usable = known & (span > 0)
    return jnp.where(usable, (scores - least) / jnp.where(span > 0, span, 1.0), 0.0)


def _filled_up(
    values: jax.Array, real: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With bidders to whom all experts are alike, so that there are as many bidders as places.

    Returns:
        Values [bidder, expert]; who bids, bool [bidder]; places of each expert, int32 scalar.
    """
    count = real.sum(dtype=jnp.int32)
    places = -(-count // num_experts)
    extra = num_experts - 1
    values = jnp.pad(values, ((0, extra), (0, 0)))
    fill = jnp.arange(extra, dtype=jnp.int32) < places * num_experts - count
    return values, jnp.concatenate([real, fill]), places


def _hold(
    values: jax.Array, bidders: jax.Array, places: jax.Array, tolerance: float, max_rounds: int
) -> _Auction:
    """Auctions until all have a place with eps = tolerance, or rounds are used up."""
    num_bidders, num_experts = values.shape
    nobody = jnp.full(num_bidders, num_experts, jnp.int32)

    def step(now: _Auction) -> _Auction:
        after = _round(now, values, bidders, places)
        again = ~after.open & (after.eps > tolerance)
        settled = jnp.where(after.open, now.settled, after.owner)
        return after._replace(
            owner=jnp.where(again, nobody, after.owner),
            eps=jnp.where(again, jnp.maximum(after.eps * _FINER, tolerance), after.eps),
            open=after.open | again,
            settled=settled,
            reached=jnp.where(after.open, now.reached, after.eps),
        )

    start = _Auction(
        owner=nobody,
        bid=jnp.zeros(num_bidders, jnp.float32),
        price=jnp.zeros(num_experts, jnp.float32),
        eps=jnp.maximum(_COARSEST, jnp.float32(tolerance)),
        rounds=jnp.zeros((), jnp.int32),
        open=bidders.any(),
        settled=nobody,
        reached=jnp.where(bidders.any(), jnp.inf, jnp.float32(tolerance)),
    )
    return jax.lax.while_loop(lambda now: now.open & (now.rounds < max_rounds), step, start)


def _round(now: _Auction, values: jax.Array, bidders: jax.Array, places: jax.Array) -> _Auction:
    """One round: all without a place bid, and experts keep the highest bids."""
    num_bidders, num_experts = values.shape
    free = bidders & (now.owner == num_experts)
    wanted, offer = _bids(values - now.price[None], now.price, now.eps)
    target = jnp.where(free, wanted, now.owner)
    bid = jnp.where(free, offer, now.bid)

    # by expert, the highest bids first; earlier bidders first among equals
    token = jnp.arange(num_bidders, dtype=jnp.int32)
    line, falling, who = jax.lax.sort((target, -bid, token), num_keys=2, is_stable=True)
    before = jnp.searchsorted(line, jnp.arange(num_experts, dtype=jnp.int32), side="left")
    place = token - before.astype(jnp.int32)[jnp.minimum(line, num_experts - 1)]
    kept = (line < num_experts) & (place < places)
    owner = jnp.zeros_like(target).at[who].set(jnp.where(kept, line, num_experts))
    last = jnp.where(kept & (place == places - 1), line, num_experts)
    price = now.price.at[last].set(-falling, mode="drop")
    return now._replace(
        owner=owner,
        bid=bid,
        price=price,
        rounds=now.rounds + 1,
        open=(bidders & (owner == num_experts)).any(),
    )


def _bids(gain: jax.Array, price: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For whom each bidder bids and how much, given what it would gain [bidder, expert]."""
    if gain.shape[1] == 1:
        return jnp.zeros(gain.shape[0], jnp.int32), jnp.broadcast_to(price + eps, gain.shape[:1])
    best, experts = jax.lax.top_k(gain, 2)
    return experts[:, 0], price[experts[:, 0]] + (best[:, 0] - best[:, 1]) + eps


def _settle(owner: jax.Array, bidders: jax.Array, places: jax.Array, num_experts: int) -> jax.Array:
    """Gives those who have no place the ones that are left, in order."""
    held = jax.nn.one_hot(owner, num_experts, dtype=jnp.int32).sum(0, dtype=jnp.int32)
    left = jnp.cumsum(places - held)
    without = bidders & (owner == num_experts)
    number = jnp.cumsum(without.astype(jnp.int32)) - 1
    rest = jnp.searchsorted(left, number, side="right").astype(jnp.int32)
    return jnp.where(without, rest, owner)

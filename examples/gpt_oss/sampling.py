"""How the next token is chosen from the logits.

`Greedy` and `Sampler` say what one sequence wants. `Sampling` is a batch of such wishes as arrays,
so that one compiled program serves all of them and every row may want something else.

A row's choice depends on its logits, its seed and how many tokens it has chosen before: not on its
neighbours in the batch, nor on how many tokens are decoded at a time.

References:
    top-p, https://arxiv.org/abs/1904.09751
    min-p, https://arxiv.org/abs/2407.01082
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.tagged import Tagged, tag

_MAX_SEED = 2**63


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the likeliest token; of equally likely ones, the one with the lowest id."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws a token at random. The limits apply one after the other, in the order below.

    Attributes:
        temperature: logits are divided by it; 0 is `Greedy`.
        top_k: only the k likeliest tokens may be drawn; None for all.
        top_p: of what is left, the fewest likeliest tokens whose share reaches p.
        min_p: of what is left, tokens at least min_p times as likely as the likeliest.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "0 or more", lambda t: t >= 0)
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda p: 0 < p <= 1)
        _check_number("min_p", self.min_p, "at least 0 and below 1", lambda p: 0 <= p < 1)
        if self.top_k is None:
            return
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool):
            raise TypeError(f"top_k must be an integer or None, got {self.top_k!r}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")

    @property
    def limited(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """Which tokens may be drawn, row by row.

    Attributes:
        top_k: int32 {b}.
        top_p: float32 {b}.
        min_p: float32 {b}.
    """

    top_k: Tagged
    top_p: Tagged
    min_p: Tagged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """What each row of a batch wants. Parts that no row needs are absent and not computed.

    Attributes:
        keys: PRNG keys {b}.
        temperature: float32 {b}, or None where all rows are greedy.
        limits: or None where no row has any.
    """

    keys: Tagged
    temperature: Tagged | None
    limits: Limits | None

    @classmethod
    def of(cls, samplers: Sequence[Greedy | Sampler], seeds: Sequence[int]) -> "Sampling":
        """A batch of samplers, one seed (at least 0, below 2^63) each.

        Raises:
            TypeError: a sampler or seed is of another type.
            ValueError: they are not equally many, or a seed is out of range.
        """
        if len(samplers) != len(seeds):
            raise ValueError(f"expected one seed a sampler, got {len(seeds)} for {len(samplers)}")
        for sampler in samplers:
            if not isinstance(sampler, Greedy | Sampler):
                raise TypeError(f"expected Greedy or Sampler, got {sampler!r}")
        wishes = [Sampler(temperature=0.0) if isinstance(s, Greedy) else s for s in samplers]
        return cls(
            keys=tag(jnp.stack([_key(seed) for seed in seeds]), "b"),
            temperature=_floats([w.temperature for w in wishes])
            if any(w.temperature for w in wishes)
            else None,
            limits=_limits(wishes) if any(w.limited and w.temperature for w in wishes) else None,
        )

    def choose(self, logits: Tagged, index: Tagged) -> Tagged:
        """Chooses a token for each row.

        Args:
            logits: float32 {b, voc}.
            index: int32 {b}, how many tokens the row has chosen before.

        Returns:
            int32 {b}.
        """
        scores = logits.untag("b", "voc")
        likeliest = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        if self.temperature is None:
            return tag(likeliest, "b")
        temperature = self.temperature.untag("b")
        greedy = temperature == 0
        scores = scores / jnp.where(greedy, 1.0, temperature)[:, None]
        noise = _noise(self.keys.untag("b"), index.untag("b"), scores.shape[-1])
        drawn = (
            _draw(scores, noise) if self.limits is None else _limited(scores, noise, self.limits)
        )
        return tag(jnp.where(greedy, likeliest, drawn), "b")


def _draw(scores: jax.Array, noise: jax.Array) -> jax.Array:
    """Ids drawn in proportion to exp(scores): the largest score plus Gumbel noise wins."""
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)


def _limited(scores: jax.Array, noise: jax.Array, limits: Limits) -> jax.Array:
    """Ids drawn from the tokens that the limits leave.

    Noise belongs to an id, not to a rank: a row draws the same token as without limits whenever
    they leave that token.
    """
    top_k, top_p, min_p = (
        x.untag("b")[:, None] for x in (limits.top_k, limits.top_p, limits.min_p)
    )
    ranked, ids = lax.top_k(scores, scores.shape[-1])
    rank = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]
    share = jax.nn.softmax(jnp.where(rank < top_k, ranked, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(share, axis=-1) - share
    kept = (rank < top_k) & (likelier < top_p) & (share >= min_p * share[:, :1])
    kept |= rank == 0
    winner = _draw(jnp.where(kept, ranked, -jnp.inf), jnp.take_along_axis(noise, ids, axis=-1))
    return jnp.take_along_axis(ids, winner[:, None], axis=-1)[:, 0]


def _noise(keys: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Gumbel noise [b, size] from each row's key and index."""

    def row(key: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, index), (size,), jnp.float32)

    return jax.vmap(row)(keys, index)


def _key(seed: int) -> jax.Array:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise TypeError(f"a seed must be an integer, got {seed!r}")
    if not 0 <= seed < _MAX_SEED:
        raise ValueError(f"a seed must be at least 0 and below 2**63, got {seed}")
    high, low = divmod(int(seed), 2**32)
    return jax.random.fold_in(jax.random.key(low), high)


def _limits(wishes: Sequence[Sampler]) -> Limits:
    top_k = [2**31 - 1 if w.top_k is None else min(w.top_k, 2**31 - 1) for w in wishes]
    return Limits(
        tag(jnp.asarray(top_k, jnp.int32), "b"),
        # A share of 1 is all tokens, whatever rounding makes of the sum.
        _floats([2.0 if w.top_p == 1 else w.top_p for w in wishes]),
        _floats([w.min_p for w in wishes]),
    )


def _floats(values: Sequence[float]) -> Tagged:
    return tag(jnp.asarray(values, jnp.float32), "b")


def _check_number(name: str, value: object, expected: str, good: Callable[[float], bool]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or not good(value):
        raise ValueError(f"{name} must be {expected}, got {value}")

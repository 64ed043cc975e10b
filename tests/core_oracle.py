"""Slow, obvious statements in NumPy float64 of what the core computes: the oracle of its tests."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from mxfp4_oracle import decode_mxfp4

import moe_jax
from moe_jax import Router, Tagged, tag

moe = jax.jit(
    moe_jax.mixture_of_experts,
    static_argnames=(
        "experts_per_token",
        "normalization",
        "tokens_per_expert_ratio",
        "algorithm",
        "overflow",
        "with_report",
        "remaining_weight",
    ),
)
"""`mixture_of_experts` as one program: to compile it costs less than to compile each operation."""

_erf = np.vectorize(math.erf)


def softmax(values: np.ndarray) -> np.ndarray:
    """Over the last axis; 0 where all are -inf."""
    result = np.zeros(values.shape)
    for index in np.ndindex(values.shape[:-1]):
        row = values[index].astype(np.float64)
        if not np.isneginf(row).all():
            powers = np.exp(row - row.max())
            result[index] = powers / powers.sum()
    return result


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values.astype(np.float64)))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def clamped_swiglu(
    gate: np.ndarray, up: np.ndarray, alpha: float = 1.0, beta: float = 0.0, limit: float = math.inf
) -> np.ndarray:
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(alpha * gate) * (up + beta)


def scores_of(row: np.ndarray, score: str) -> np.ndarray:
    if score == "softmax":
        return softmax(row)
    return sigmoid(row) if score == "sigmoid" else row.astype(np.float64)


def best(scores: np.ndarray, k: int) -> list[int]:
    """The indices of the `k` largest, the lowest index first among equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def route(
    logits: np.ndarray, k: int, router: Router, bias: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [tokens, k] of finite logits [tokens, experts], token by token."""
    ids = np.zeros((len(logits), k), np.int64)
    weights = np.zeros((len(logits), k))
    for t, row in enumerate(logits):
        before = router.order == "before_top_k"
        select = (scores_of(row, router.score) if before else row.astype(np.float64)) + bias
        if router.num_groups > 1:
            members = np.split(np.arange(len(row)), router.num_groups)
            count = 1 if router.group_score == "max" else 2
            worth = np.array([np.sort(select[m])[::-1][:count].sum() for m in members])
            allowed = np.concatenate([members[g] for g in best(worth, router.groups_per_token)])
            select = np.where(np.isin(np.arange(len(row)), allowed), select, -np.inf)
        ids[t] = best(select, k)
        if before:
            weights[t] = scores_of(row, router.score)[ids[t]]
        else:
            weights[t] = scores_of(row[ids[t]], router.score)
        if router.renormalize:
            weights[t] /= weights[t].sum()
    return ids, weights * router.scale


def combine(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, expert: Callable[[int, np.ndarray], object]
) -> np.ndarray:
    """Sum over pairs of weight x expert(id, row), pair by pair; ids outside count as nothing."""
    x = x.astype(np.float64)
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for e, w in zip(ids[t], weights[t], strict=True):
            if e >= 0:
                y[t] += w * np.asarray(expert(int(e), x[t]))
    return y


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who computes what: kept[t] lists the experts of token t, best first, and the counts."""

    kept: list[list[int]]
    assigned: int
    rerouted: int
    dropped: int
    empty_tokens: int


def expert_choice(
    logits: np.ndarray,
    priority: np.ndarray,
    k: int,
    budget: int,
    overflow: str,
    mask: np.ndarray | None = None,
) -> Plan:
    """Expert choice restricted to preferences, as one would explain it.

    Each expert lines up the tokens: who ranks it higher goes first, then who scores it higher, then
    who comes earlier. It takes the first `budget`. Each token keeps its best `k` of the experts
    that took it. With `drop` only tokens that rank an expert among their best `k` line up.
    """
    tokens, experts = logits.shape
    mask = np.ones(tokens, bool) if mask is None else mask
    rank = np.zeros((tokens, experts), np.int64)
    for t in range(tokens):
        rank[t, best(logits[t], experts)] = np.arange(experts)
    takers: list[list[int]] = [[] for _ in range(tokens)]
    for e in range(experts):
        line = [
            t
            for t in range(tokens)
            if mask[t]
            and not np.isneginf(logits[t, e])
            and (overflow == "reroute" or rank[t, e] < k)
        ]
        line.sort(key=lambda t: (rank[t, e], -priority[t, e], t))
        for t in line[:budget]:
            takers[t].append(e)
    kept = [sorted(takers[t], key=lambda e: rank[t, e])[:k] for t in range(tokens)]
    pairs = [(t, e) for t in range(tokens) for e in kept[t]]
    wanted = sum(
        int(mask[t] and rank[t, e] < k and not np.isneginf(logits[t, e]))
        for t in range(tokens)
        for e in range(experts)
    )
    rerouted = sum(int(rank[t, e] >= k) for t, e in pairs)
    return Plan(
        kept,
        assigned=len(pairs),
        rerouted=rerouted,
        dropped=wanted - (len(pairs) - rerouted),
        empty_tokens=sum(int(mask[t] and not kept[t]) for t in range(tokens)),
    )


@dataclasses.dataclass(frozen=True)
class TinyExperts:
    """Gated experts as float64 arrays, and as the library's `GatedMLP`.

    Attributes:
        gate, up: [expert, intermediate, hidden].
        down: [expert, hidden, intermediate].
    """

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray

    @classmethod
    def random(
        cls, rng: np.random.Generator, num_experts: int = 6, hidden: int = 5, intermediate: int = 7
    ) -> "TinyExperts":
        def draw(outputs: int, inputs: int) -> np.ndarray:
            values = rng.normal(size=(num_experts, outputs, inputs)) / math.sqrt(inputs)
            return values.astype(np.float32).astype(np.float64)

        return cls(
            draw(intermediate, hidden), draw(intermediate, hidden), draw(hidden, intermediate)
        )

    def __call__(self, expert: int, row: np.ndarray) -> np.ndarray:
        hidden = clamped_swiglu(self.gate[expert] @ row, self.up[expert] @ row)
        return self.down[expert] @ hidden

    def ours(self, dtype=jnp.float32) -> moe_jax.GatedMLP:
        return moe_jax.GatedMLP(*(weight(w, dtype) for w in (self.gate, self.up, self.down)))


def weight(array: np.ndarray, dtype=jnp.float32) -> Tagged:
    return tag(jnp.asarray(array, dtype), "expert", "out", "in")


def f32(array: np.ndarray, *axes: str) -> Tagged:
    return tag(jnp.asarray(array, jnp.float32), *axes)


def random_mxfp4(
    rng: np.random.Generator, num_experts: int, outputs: int, num_blocks: int
) -> tuple[moe_jax.BlockScaled, np.ndarray]:
    """Packed weights {expert, out, in} near 1 in size, and what they stand for."""
    blocks = rng.integers(0, 256, (num_experts, outputs, num_blocks, 16), dtype=np.uint8)
    scales = rng.integers(122, 127, (num_experts, outputs, num_blocks), dtype=np.uint8)
    packed = moe_jax.BlockScaled(
        tag(jnp.asarray(blocks), "expert", "out", "block", "byte"),
        tag(jnp.asarray(scales), "expert", "out", "block"),
    )
    return packed, decode_mxfp4(blocks, scales)


def ratio_for(algorithm: str, ratio: float) -> float | None:
    """The ratio for `fixed_budget`; the other algorithms refuse one."""
    return ratio if algorithm == "fixed_budget" else None


def assert_same(a, b):
    """Two pytrees with the same structure and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(bits(one), bits(other))


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.reshape(-1).view(f"u{array.itemsize}")

"""Attention with sinks by position, in float64: one query, one head, one key at a time."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax import Tagged, tag

EMPTY = -1


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands: q [b, q, h, hd], k and v [b, kv, k, hd], sinks [h], q_at [b, q], k_at [b, k]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sinks: np.ndarray
    q_at: np.ndarray
    k_at: np.ndarray
    window: int | None = None

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        q_at: np.ndarray,
        k_at: np.ndarray,
        *,
        kv: int,
        group: int,
        head_dim: int,
        window: int | None,
        dtype=np.float32,
    ) -> "Case":
        """Random numbers that `dtype` holds exactly, at these positions."""
        (batch, queries), keys = q_at.shape, k_at.shape[1]

        def floats(*shape: int) -> np.ndarray:
            return np.array(jnp.asarray(rng.standard_normal(shape), dtype), np.float32)

        at = q_at.astype(np.int32), k_at.astype(np.int32)
        kv_shape = batch, kv, keys, head_dim
        heads = kv * group
        return cls(
            floats(batch, queries, heads, head_dim),
            floats(*kv_shape),
            floats(*kv_shape),
            floats(heads),
            *at,
            window,
        )

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k, self.v, self.sinks, self.q_at, self.k_at

    def tagged(self, dtype=jnp.float32) -> tuple[Tagged, ...]:
        axes = (
            ("b", "q", "h", "hd"),
            ("b", "kv", "k", "hd"),
            ("b", "kv", "k", "hd"),
            ("h",),
            ("b", "q"),
            ("b", "k"),
        )
        return tuple(
            tag(jnp.asarray(x, dtype if x.dtype.kind == "f" else jnp.int32), *names)
            for x, names in zip(self.arrays, axes, strict=True)
        )

    def seen(self) -> np.ndarray:
        """Which keys each query sees: bool [b, q, k]."""
        q, k = self.q_at[:, :, None], self.k_at[:, None, :]
        near = True if self.window is None else k > q - self.window
        return (k >= 0) & (k <= q) & near

    def expected(self) -> np.ndarray:
        """float64 [b, q, h, hd]."""
        q, k, v, sinks = (x.astype(np.float64) for x in self.arrays[:4])
        group, seen = q.shape[2] // k.shape[1], self.seen()
        out = np.zeros_like(q)
        for b, i, h in np.ndindex(q.shape[:3]):
            keys = np.flatnonzero(seen[b, i])
            logits = np.array([q[b, i, h] @ k[b, h // group, j] for j in keys]) / q.shape[3] ** 0.5
            largest = max([sinks[h], *logits])
            weights = np.exp(logits - largest)
            total = weights.sum() + np.exp(sinks[h] - largest)
            for j, weight in zip(keys, weights, strict=True):
                out[b, i, h] += weight / total * v[b, h // group, j]
        return out


def sequence(start: int, queries: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries from `start` on, and of keys that lie in their own slots."""
    end, slot = start + queries, np.arange(slots)
    return np.arange(start, end)[None], np.where(slot < end, slot, EMPTY)[None]


def ring(start: int, queries: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries from `start` on, and of keys in a ring, then of their own."""
    last, slot = start - 1, np.arange(slots)
    held = last - (last - slot) % slots
    own = np.arange(start, start + queries)
    return own[None], np.concatenate([np.where(held < 0, EMPTY, held), own])[None]

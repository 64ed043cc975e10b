"""Layers of gpt-oss experts in NumPy float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from mxfp4_oracle import decode_mxfp4

import moe_jax
from moe_jax import tag


@dataclasses.dataclass(frozen=True)
class Packed:
    """MXFP4 weights: blocks uint8 [expert, out, block, 16], scales uint8 [expert, out, block]."""

    blocks: np.ndarray
    scales: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, num_experts: int, out: int, size: int) -> "Packed":
        shape = num_experts, out, size // 32
        return cls(
            rng.integers(0, 256, (*shape, 16), dtype=np.uint8),
            rng.integers(122, 125, shape, dtype=np.uint8),
        )

    def values(self) -> np.ndarray:
        """float64 [expert, out, in]; NaN where the scale is 255."""
        return decode_mxfp4(self.blocks, self.scales)

    def ours(self) -> moe_jax.BlockScaled:
        axes = "expert", "out", "block"
        return moe_jax.BlockScaled(
            tag(jnp.asarray(self.blocks), *axes, "byte"), tag(jnp.asarray(self.scales), *axes)
        )


@dataclasses.dataclass(frozen=True)
class Layer:
    """Experts, and what they make of rows.

    Attributes:
        gate_up: [expert, 2 * intermediate, hidden].
        gate_up_bias: float32 [expert, 2 * intermediate].
        down: [expert, hidden, intermediate].
        down_bias: float32 [expert, hidden].
        activation: an interleaved SwiGLU.
    """

    gate_up: Packed
    gate_up_bias: np.ndarray
    down: Packed
    down_bias: np.ndarray
    activation: moe_jax.Activation = moe_jax.GPT_OSS_ACTIVATION

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        num_experts: int,
        hidden: int,
        intermediate: int,
        activation: moe_jax.Activation = moe_jax.GPT_OSS_ACTIVATION,
    ) -> "Layer":
        return cls(
            Packed.random(rng, num_experts, 2 * intermediate, hidden),
            rng.normal(size=(num_experts, 2 * intermediate)).astype(np.float32),
            Packed.random(rng, num_experts, hidden, intermediate),
            rng.normal(size=(num_experts, hidden)).astype(np.float32),
            activation,
        )

    @property
    def hidden(self) -> int:
        return self.down_bias.shape[1]

    def expert(self, index: int, rows: np.ndarray) -> np.ndarray:
        a = self.activation
        limit = np.inf if a.limit is None else a.limit
        lanes = rows @ self.gate_up.values()[index].T + self.gate_up_bias[index]
        gate, up = np.minimum(lanes[:, 0::2], limit), np.clip(lanes[:, 1::2], -limit, limit)
        hidden = gate / (1 + np.exp(-a.alpha * gate)) * (up + a.beta)
        return hidden @ self.down.values()[index].T + self.down_bias[index]

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """x [tokens, hidden], ids and weights [tokens, k] -> [tokens, hidden]."""
        y = np.zeros(x.shape)
        for e in range(len(self.down_bias)):
            token, place = np.nonzero(ids == e)
            rows = self.expert(e, x[token].astype(np.float64))
            np.add.at(y, token, rows * weights[token, place][:, None])
        return y

    def routed(
        self, x: np.ndarray, logits: np.ndarray, k: int, mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Softmax over the `k` best of logits [tokens, expert]; -inf bars an expert."""
        ids = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(logits.astype(np.float64), ids, 1)
        top = best.max(1, keepdims=True, initial=-np.inf)
        weights = np.exp(best - np.where(np.isfinite(top), top, 0))
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
        ids = np.where(np.isneginf(best), -1, ids)
        return self(x, ids if mask is None else np.where(mask[:, None], ids, -1), weights)

    def ours(self) -> moe_jax.GptOssMLP:
        return moe_jax.GptOssMLP(
            self.gate_up.ours(),
            tag(jnp.asarray(self.gate_up_bias), "expert", "out"),
            self.down.ours(),
            tag(jnp.asarray(self.down_bias), "expert", "out"),
            self.activation,
        )

    def tiled(self) -> moe_jax.GptOssMLP:
        return moe_jax.prepare_experts(self.ours())

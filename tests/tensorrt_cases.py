"""Random layers of TensorRT's kind, and what they compute, stated in NumPy."""

import dataclasses

import ml_dtypes
import numpy as np
from core_oracle import clamped_swiglu

from moe_jax.formats.tensorrt import DataType, MoEActType, MoELayer

EXPERTS, HIDDEN, INTERMEDIATE, BATCH, SEQ, CHOSEN = 5, 7, 32, 2, 3, 2


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Weights [E, H, I], [E, H, I], [E, I, H] and biases, float32."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    biases: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def random(cls, rng) -> "Arrays":
        def draw(*shape):
            return rng.normal(size=(EXPERTS, *shape)).astype(np.float32)

        return cls(
            draw(HIDDEN, INTERMEDIATE),
            draw(HIDDEN, INTERMEDIATE),
            draw(INTERMEDIATE, HIDDEN) / np.float32(4),
            (draw(INTERMEDIATE), draw(INTERMEDIATE), draw(HIDDEN)),
        )

    def layer(self, biases: bool = True, kind: MoEActType = MoEActType.SILU) -> MoELayer:
        layer = MoELayer()
        layer.set_gated_weights(self.gate, self.up, self.down, kind)
        if biases:
            layer.set_gated_biases(*self.biases)
        return layer


def routed(rng):
    """Hidden states [B, S, H], distinct ids and scores [B, S, K] that sum to 1."""
    x = rng.normal(size=(BATCH, SEQ, HIDDEN)).astype(np.float32)
    ids = np.stack([rng.permutation(EXPERTS)[:CHOSEN] for _ in range(BATCH * SEQ)])
    scores = rng.uniform(0.1, 1, (BATCH * SEQ, CHOSEN))
    scores /= scores.sum(1, keepdims=True)
    shape = BATCH, SEQ, CHOSEN
    return x, ids.reshape(shape).astype(np.int32), scores.reshape(shape).astype(np.float32)


def expected(arrays, x, ids, scores, *, biases=True, params=(), quantize=None, kind="SILU"):
    """Token by token in float64: sum of score * fcDown(q(act(fcGate(x)) * fcUp(x)))."""
    y = np.zeros(x.shape)
    zero = 0.0, 0.0, 0.0
    for b, s, k in np.ndindex(ids.shape):
        e, row = ids[b, s, k], x[b, s].astype(np.float64)
        bias = [part[e] for part in arrays.biases] if biases else zero
        gate = row @ arrays.gate[e].astype(np.float64) + bias[0]
        up = row @ arrays.up[e].astype(np.float64) + bias[1]
        hidden = gate * up if kind == "NONE" else clamped_swiglu(gate, up, *params)
        if quantize is not None:
            hidden = quantize(hidden, e)
        y[b, s] += scores[b, s, k] * (hidden @ arrays.down[e].astype(np.float64) + bias[2])
    return y


def fp8(scale):
    """FP8 by ml_dtypes' cast of what is limited to its range."""

    def quantize(hidden, e):
        factor = np.float32(scale[e] if np.ndim(scale) else scale)
        codes = np.clip(hidden.astype(np.float32) / factor, -448, 448)
        return codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * factor

    return quantize


def nvfp4(scale):
    """NVFP4 in blocks of 16 by ml_dtypes' casts."""

    def quantize(hidden, e):
        factor = np.float32(scale[e] if np.ndim(scale) else scale)
        x = hidden.astype(np.float32).reshape(-1, 16)
        blocks = np.clip(np.abs(x).max(1) / np.float32(6) / factor, np.float32(2**-6), 448)
        step = blocks.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * factor
        codes = (x / step[:, None]).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
        return (codes * step[:, None]).reshape(-1)

    return quantize


def set_static(layer, scale):
    layer.set_quantization_static(scale, DataType.FP8)


def set_dynamic(layer, scale):
    layer.set_quantization_dynamic_dbl_q(scale, DataType.FP4, (1, 1, 16), DataType.FP8)

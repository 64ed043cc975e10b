"""The layer in float64 with a table for the codes: what every contender's output is compared with.

Nothing is rounded on the way, and every expert is run on every token, so that there is neither a
gather nor a sort to get wrong. JAX computes it, on the device, because NumPy would need minutes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from moe_layer_problem import Packed, Shape, Weights, route

# what the codes of E2M1 stand for
_CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
_CODES = np.concatenate([_CODES, -_CODES])
_ALPHA, _LIMIT = 1.702, 7.0


def reference(shape: Shape, layer: Weights, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The layer's output, float64 [tokens, hidden_size].

    Args:
        shape: the sizes.
        layer: the weights; arrays of NumPy or of JAX.
        x: [tokens, hidden_size].
        logits: [tokens, num_experts].
    """
    tokens = len(x)
    # two sizes of chunks serve all numbers of tokens, so that little is compiled
    chunk = 128 if tokens <= 128 else 512
    ids, chosen = route(logits, shape.experts_per_token)
    gates = np.zeros((-(-tokens // chunk) * chunk, shape.num_experts))
    np.put_along_axis(gates[:tokens], ids, chosen, axis=-1)
    padded = np.zeros((len(gates), shape.hidden_size))
    padded[:tokens] = x
    arrays = (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)
    with jax.enable_x64(True):
        leaves = jax.tree.map(jnp.asarray, tuple(_leaves(part) for part in arrays))
        parts = [
            np.asarray(_layer(leaves, padded[i : i + chunk], gates[i : i + chunk]))
            for i in range(0, len(gates), chunk)
        ]
    return np.concatenate(parts)[:tokens]


def relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN stays NaN."""
    difference = np.asarray(output, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def _leaves(part: Packed | np.ndarray) -> object:
    return (part.blocks, part.scales) if isinstance(part, Packed) else part


@jax.jit
def _layer(leaves: tuple, x: jax.Array, gates: jax.Array) -> jax.Array:
    gate_up, gate_up_bias, down, down_bias = leaves

    def add_expert(e: jax.Array, total: jax.Array) -> jax.Array:
        both = _linear(x, gate_up, gate_up_bias, e)
        gate = jnp.minimum(both[:, 0::2], _LIMIT)
        up = jnp.clip(both[:, 1::2], -_LIMIT, _LIMIT)
        hidden = gate / (1.0 + jnp.exp(-_ALPHA * gate)) * (up + 1.0)
        return total + gates[:, e, None] * _linear(hidden, down, down_bias, e)

    return jax.lax.fori_loop(0, gates.shape[1], add_expert, jnp.zeros_like(x))


def _linear(x: jax.Array, packed: tuple, bias: jax.Array, e: jax.Array) -> jax.Array:
    blocks, scales = packed[0][e], packed[1][e]
    codes = jnp.stack([blocks & 15, blocks >> 4], -1)
    values = jnp.asarray(_CODES)[codes].reshape(*scales.shape, 32)
    weight = values * jnp.exp2(scales.astype(jnp.float64) - 127.0)[:, :, None]
    product = x @ weight.reshape(scales.shape[0], -1).T
    return product + bias[e].astype(jnp.float64)[None, :]

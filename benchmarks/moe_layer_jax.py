"""Contenders of `moe_layer.py` that run in JAX: ours, `lax.ragged_dot`, and the naive way.

Each is made once for all numbers of tokens; `prepare` compiles it for one of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import moe_layer_problem as problem
import numpy as np
from jax import lax
from moe_layer_problem import Packed, Shape, Weights
from timing_jax import Repeated

import moe_jax
from moe_jax import BlockScaled, GptOssMLP, tag


class Unfit(Exception):
    """A contender is not run at this size; says why."""


def gpt_oss_experts(layer: Weights) -> GptOssMLP:
    """The weights as they come out of a checkpoint: MXFP4 and bfloat16 biases."""

    def packed(part: Packed) -> BlockScaled:
        return BlockScaled(
            tag(jnp.asarray(part.blocks), "expert", "out", "block", "byte"),
            tag(jnp.asarray(part.scales), "expert", "out", "block"),
        )

    return GptOssMLP(
        packed(layer.gate_up),
        tag(jnp.asarray(layer.gate_up_bias, jnp.bfloat16), "expert", "out"),
        packed(layer.down),
        tag(jnp.asarray(layer.down_bias, jnp.bfloat16), "expert", "out"),
    )


def prepared(experts: GptOssMLP) -> Any:
    """The experts as the device wants them, where the library has a way to make them so."""
    prepare = getattr(moe_jax, "prepare_experts", None)
    return experts if prepare is None else jax.block_until_ready(prepare(experts))


class Ours:
    """`moe_jax.mixture_of_experts`, weight sets taking turns under one `jax.jit`.

    A layer's rows are what the layer before it returned, so that no two layers overlap.
    """

    def __init__(self, shape: Shape, experts: Sequence[Any]) -> None:
        self._shape = shape
        self._experts = experts

    def prepare(self, tokens: int, routing: str) -> Repeated:
        """Results are the rows {tokens, hidden_size} after each layer."""
        sets = problem.sets_in_use(tokens, len(self._experts))
        return _chain(
            lambda experts, x, gating: moe_jax.mixture_of_experts(
                experts, x, gating, experts_per_token=self._shape.experts_per_token
            ),
            self._experts[:sets],
            self._shape,
            tokens,
            routing,
        )


class Naive:
    """Decodes the weights, then `jnp.einsum`: the chosen experts' for few tokens, else all."""

    def __init__(self, shape: Shape, experts: Sequence[GptOssMLP]) -> None:
        self._shape = shape
        self._experts = experts

    def prepare(self, tokens: int, routing: str) -> Repeated:
        if tokens > 2048:
            raise Unfit("every expert on every token is not worth its time above 2048 tokens")
        few = tokens * self._shape.experts_per_token <= self._shape.num_experts
        layer = _naive_chosen if few else _naive_all
        return _chain(
            lambda experts, x, gating: layer(experts, x, gating, self._shape.experts_per_token),
            self._experts,
            self._shape,
            tokens,
            routing,
        )


def _chain(layer: Any, experts: Sequence[Any], shape: Shape, tokens: int, routing: str) -> Repeated:
    """Layers after one another, on the problem's rows and logits."""
    # logits of its own for every turn: equal ones would be routed once
    turns = range(len(experts) * problem.rotations(tokens))
    gatings = [jnp.asarray(problem.logits(shape, tokens, i, routing), jnp.bfloat16) for i in turns]
    # traced once, and then a part of the one program that is compiled
    layer = jax.jit(layer)

    def layers(x: jax.Array, experts: Sequence[Any], gatings: Sequence[jax.Array]) -> list:
        results = []
        for i in turns:
            x = layer(experts[i % len(experts)], x, gatings[i])
            results.append(x)
        return results

    x = jnp.asarray(problem.rows(shape, tokens), jnp.bfloat16)
    return Repeated(layers, x, tuple(experts), tuple(gatings))


def _route(gating: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    values, ids = lax.top_k(gating.astype(jnp.float32), experts_per_token)
    return jax.nn.softmax(values), ids


def _activate(both: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(both[..., 0::2], 7.0), jnp.clip(both[..., 1::2], -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)


def _naive_chosen(experts: GptOssMLP, x: jax.Array, gating: jax.Array, k: int) -> jax.Array:
    gates, ids = _route(gating, k)
    one = jax.tree.map(lambda leaf: leaf[ids], experts)
    gate_up, down = (_decoded(weight) for weight in (one.gate_up, one.down))
    both = jnp.einsum("td,tkod->tko", x, gate_up) + one.gate_up_bias.array
    y = jnp.einsum("tkd,tkod->tko", _activate(both), down) + one.down_bias.array
    return jnp.einsum("tk,tkd->td", gates, y.astype(jnp.float32)).astype(x.dtype)


def _naive_all(experts: GptOssMLP, x: jax.Array, gating: jax.Array, k: int) -> jax.Array:
    chosen, ids = _route(gating, k)
    slots = jax.nn.one_hot(ids, gating.shape[1], dtype=jnp.float32)
    gates = jnp.einsum("tk,tke->te", chosen, slots)
    gate_up, down = (_decoded(weight) for weight in (experts.gate_up, experts.down))
    both = jnp.einsum("td,eod->eto", x, gate_up) + experts.gate_up_bias.array[:, None, :]
    y = jnp.einsum("etd,eod->eto", _activate(both), down) + experts.down_bias.array[:, None, :]
    return jnp.einsum("te,etd->td", gates, y.astype(jnp.float32)).astype(x.dtype)


def _decoded(weight: Any) -> jax.Array:
    """BlockScaled arrays with any leading axes -> bfloat16 [..., in]."""
    blocks, scales = weight.blocks.array, weight.scales.array
    lead = tuple(f"axis{i}" for i in range(scales.ndim - 1))
    whole = BlockScaled(tag(blocks, *lead, "block", "byte"), tag(scales, *lead, "block"))
    return whole.dequantize(jnp.bfloat16).array


class RaggedDot:
    """The two matmuls alone, by `lax.ragged_dot` on bfloat16 weights."""

    def __init__(self, shape: Shape, sets: int = 2) -> None:
        self._shape = shape
        keys = jax.random.split(jax.random.key(1), 2 * sets)
        self._weights = [
            tuple(
                _normal(key, (shape.num_experts, inputs, outputs), inputs**-0.5)
                for key, (outputs, inputs) in zip(pair, (shape.gate_up, shape.down), strict=True)
            )
            for pair in keys.reshape(sets, 2)
        ]

    def prepare(self, tokens: int, routing: str) -> Repeated:
        shape, sets = self._shape, len(self._weights)
        ids = [
            problem.route(problem.logits(shape, tokens, i, routing), shape.experts_per_token)[0]
            for i in range(sets)
        ]
        sizes = [jnp.asarray(group_sizes(shape, chosen)) for chosen in ids]
        count = tokens * shape.experts_per_token
        first = _normal(jax.random.key(2), (count, shape.hidden_size), 1.0)
        second = _normal(jax.random.key(3), (count, shape.intermediate_size), 1.0)

        def matmuls(first: jax.Array, second: jax.Array, weights: Any, sizes: Any) -> list:
            return [
                (lax.ragged_dot(first, gate_up, size), lax.ragged_dot(second, down, size))
                for (gate_up, down), size in zip(weights, sizes, strict=True)
            ]

        return Repeated(matmuls, first, second, self._weights, sizes)


def group_sizes(shape: Shape, ids: np.ndarray) -> np.ndarray:
    """How many pairs each expert has, int32 [num_experts]."""
    return np.bincount(ids.reshape(-1), minlength=shape.num_experts).astype(np.int32)


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16) * scale)(key)

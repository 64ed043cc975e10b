"""gpt-oss with random weights on a mesh, and the programs that `sharded.py` measures.

Weights are made where they belong: each device computes its own part of each array, and the numbers
do not depend on the mesh. Programs are lowered one after the other and compiled side by side.
"""

import dataclasses
import functools
import math
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt_oss.cache import Cache
from gpt_oss.config import FULL, SLIDING, GptOssConfig
from gpt_oss.layout import ParameterSpec, parameter_specs
from gpt_oss.mesh import sharding_for
from gpt_oss.model import GptOss
from gpt_oss.placement import constrained, on_every_device
from gpt_oss.yarn import YarnScaling
from moe_jax import BlockScaled, Sharding, tag
from moe_jax.experts.prepare import prepare_for_devices

BLOCK = 32
"""Elements of MXFP4 that share a scale."""

_CODES_RMS = 3.8  # of a random code times a scale of a half, one or two

# layers, experts, experts per token, hidden, intermediate, heads, key/value heads, head size,
# vocabulary, window
_SIZES = {
    "20b": (24, 32, 4, 2880, 2880, 64, 8, 64, 201088, 128),
    "120b": (36, 128, 4, 2880, 2880, 64, 8, 64, 201088, 128),
    "tiny": (2, 16, 3, 64, 96, 16, 8, 12, 320, 8),
}
MODELS = tuple(_SIZES)


def model_config(name: str) -> GptOssConfig:
    """The shape of a released model, or of a tiny one that fits every mesh of 8 devices."""
    layers, experts, chosen, hidden, inner, heads, kv, size, vocabulary, window = _SIZES[name]
    return GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=size,
        num_experts=experts,
        experts_per_token=chosen,
        layer_types=tuple(FULL if n % 2 else SLIDING for n in range(layers)),
        sliding_window=window,
        max_position_embeddings=131072,
        rope_theta=150000.0,
        rope_scaling=YarnScaling(32.0, 4096, 32.0, 1.0, False),
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        eos_token_ids=(vocabulary - 1,),
    )


class RandomWeights:
    """Random parameters of a model, made on the devices that hold them.

    Attributes:
        seconds: what making them took so far.
    """

    def __init__(self, config: GptOssConfig, dtype: Any, sharding: Sharding | None) -> None:
        self._config, self._dtype, self._sharding = config, dtype, sharding
        self._specs = parameter_specs(config)
        self._compiled: dict[ParameterSpec, Callable[[Any], Any]] = {}
        self.seconds = 0.0

    def __call__(self, name: str) -> Any:
        """A parameter by its Hugging Face name: `Tagged`, or MXFP4 for experts' matrices."""
        begin = time.perf_counter()
        spec = dataclasses.replace(self._specs[name], name="")
        if spec not in self._compiled:
            self._compiled[spec] = self._maker(spec)
        made = self._compiled[spec](np.uint32(zlib.crc32(name.encode())))
        made = jax.block_until_ready(prepare_for_devices(made))
        self.seconds += time.perf_counter() - begin
        return made

    def _maker(self, spec: ParameterSpec) -> Callable[[Any], Any]:
        def make(seed: Any) -> Any:
            if spec.is_expert_weight:
                return _random_mxfp4(seed, spec)
            if spec.init != "normal":
                fill = {"zeros": jnp.zeros, "ones": jnp.ones}[spec.init]
                return tag(fill(spec.shape, self._dtype), *spec.axes)
            values = self._config.initializer_range * _normal(seed, spec.shape)
            return tag(values.astype(self._dtype), *spec.axes)

        if self._sharding is None:
            return jax.jit(make)
        where = Sharding(self._sharding.mesh, {}) if spec.is_whole else self._sharding
        return jax.jit(make, out_shardings=where.of(jax.eval_shape(make, np.uint32(0))))


def _random_mxfp4(seed: jax.Array, spec: ParameterSpec) -> BlockScaled:
    """Random codes and scales {expert, out, in} that keep the size of rows from growing."""
    experts, outputs, inputs = spec.shape
    exponent = 127 - round(math.log2(_CODES_RMS * inputs**0.5))
    shape = experts, outputs, inputs // BLOCK
    codes = _random_bits(seed, (*shape, BLOCK // 2)).astype(jnp.uint8)
    powers = _random_bits(seed + jnp.uint32(1), shape) % jnp.uint32(3) + jnp.uint32(exponent - 1)
    lead = spec.axes[:2]
    return BlockScaled(
        tag(codes, *lead, "block", "byte"), tag(powers.astype(jnp.uint8), *lead, "block")
    )


def _normal(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 numbers of mean 0 and variance 1, nearly normal: sums of four random bytes."""
    bits = _random_bits(seed, shape)
    total = sum((bits >> (8 * n) & 255).astype(jnp.float32) for n in range(4))
    return (total - 4 * 127.5) * (12 / (4 * (256**2 - 1))) ** 0.5


def _random_bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 that follow from the seed and the place, by a few operations that compile at once."""
    bits = jnp.broadcast_to(seed * jnp.uint32(0x9E3779B1), shape)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        bits += stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one length, taken a chunk at a time.

    Attributes:
        rows: how many.
        length: tokens of each; a multiple of `chunk`.
        chunk: tokens of each that one call takes.
        reaches: full layers look as far as the least of these that will do, see `GptOss.step`.
    """

    rows: int
    length: int
    chunk: int
    reaches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def calls(self) -> list[tuple[int, int]]:
        """Start and reach of each call."""
        starts = range(0, self.length, self.chunk)
        return [(at, min(r for r in self.reaches if r >= at + self.chunk)) for at in starts]


class MeshModel:
    """A model on a mesh.

    Attributes:
        config: its shape.
        sharding: None for one device.
        model: with random weights.
        weight_seconds: what making them took.
    """

    def __init__(self, config: GptOssConfig, sizes: Mapping[str, int], dtype: Any) -> None:
        """Makes the weights; sizes of mesh axes that are left out are 1."""
        several = math.prod(sizes.values()) > 1
        self.config = config
        self.sharding = sharding_for(config, dict(sizes)) if several else None
        weights = RandomWeights(config, dtype, self.sharding)
        self.model = GptOss(config, weights, dtype=dtype, sharding=self.sharding)
        self.weight_seconds = weights.seconds
        self._leaves, self._treedef = jax.tree.flatten(self.model)
        self._fillers: dict[tuple[int, ...], Any] = {}

    def cache(self, rows: int, context: int) -> Any:
        """The layers of a cache that is full of something."""
        empty = jax.eval_shape(lambda: self.model.empty_cache(rows, context).layers)
        leaves, treedef = jax.tree.flatten(empty)
        filled = [self._filler(leaf)(np.float32(phase)) for phase, leaf in enumerate(leaves)]
        return jax.block_until_ready(jax.tree.unflatten(treedef, filled))

    def _filler(self, like: jax.ShapeDtypeStruct) -> Any:
        """A function of a number that gives keys or values {b, kv, k, hd} like these."""
        if like.shape not in self._fillers:

            def fill(phase: jax.Array) -> jax.Array:
                waves = tag(_waves(like, phase), "b", "kv", "k", "hd")
                return constrained(waves, self.sharding).array

            self._fillers[like.shape] = jax.jit(fill)
        return self._fillers[like.shape]

    def decode(self, layers: Any, rows: int, most: int) -> Any:
        """A lowered program (layers, start, token, shift, count, steps) -> (layers, tokens).

        From position `start` on it takes `steps` greedy steps, at most `most`, in a loop on the
        device as the engine does, and returns int32 [b, most]. `shift` [b] is added to each token
        chosen: rows that once agree do not stay together.
        """

        def decode(leaves: Any, layers: Any, *args: jax.Array) -> Any:
            return _decode(jax.tree.unflatten(self._treedef, leaves), layers, most, *args)

        return self._lower(decode, layers, (), (rows,), (rows,), (rows,), ())

    def prefill(self, layers: Any, prompts: Prompts, reach: int) -> Any:
        """A lowered program (layers, start, tokens, count) -> (layers, logits [b, voc])."""

        def prefill(leaves: Any, layers: Any, start: Any, tokens: Any, count: Any) -> Any:
            model = jax.tree.unflatten(self._treedef, leaves)
            cache = Cache(layers, tag(jnp.full(count.shape, start), "b"))
            tokens, count = tag(tokens, "b", "s"), tag(count, "b")
            logits, cache = model.step(tokens, cache, count=count, reach=reach)
            return cache.layers, on_every_device(logits, model.sharding).untag("b", "voc")

        shape = prompts.rows, prompts.chunk
        return self._lower(prefill, layers, (), shape, (prompts.rows,))

    def forward(self, rows: int, length: int) -> Any:
        """A lowered program of tokens [b, s], without a cache.

        It returns the logits [b, voc] of what follows the last, and [b, s] by how much the
        likeliest logit is ahead of the second at each position.
        """

        def forward(leaves: Any, tokens: jax.Array) -> Any:
            model = jax.tree.unflatten(self._treedef, leaves)
            logits = on_every_device(model(tag(tokens, "b", "s")), model.sharding)
            logits = logits.untag("b", "s", "voc")
            best = jnp.argmax(logits, -1, keepdims=True)
            is_best = lax.broadcasted_iota(best.dtype, logits.shape, 2) == best
            second = jnp.where(is_best, -jnp.inf, logits).max(-1)
            return logits[:, -1], logits.max(-1) - second

        tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
        return jax.jit(forward).lower(self._leaves, tokens)

    def run(self, compiled: Any, *args: Any) -> Any:
        """Calls a compiled program of this model."""
        return compiled(self._leaves, *args)

    def _lower(self, function: Any, layers: Any, *shapes: tuple[int, ...]) -> Any:
        """Lowers `function` (leaves, layers, integers...) -> (layers, ...), which takes the cache.

        The cache comes back as it was given, so that it can be given again.
        """
        where = None
        if self.sharding is not None:
            where = jax.tree.map(lambda leaf: leaf.sharding, layers), None
        args = [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes]
        jitted = jax.jit(function, donate_argnums=1, out_shardings=where)
        return jitted.lower(self._leaves, layers, *args)


def _decode(
    model: GptOss,
    layers: Any,
    most: int,
    start: jax.Array,
    token: jax.Array,
    shift: jax.Array,
    count: jax.Array,
    steps: jax.Array,
) -> tuple[Any, jax.Array]:
    rows = token.shape[0]
    real = None if rows == 1 else tag(count, "b")

    def one(carry: Any) -> Any:
        step, cache, token, tokens = carry
        logits, cache = model.step(tag(token[:, None], "b", "s"), cache, count=real)
        chosen = tag(jnp.argmax(logits.untag("b", "voc"), -1).astype(jnp.int32), "b")
        chosen = on_every_device(chosen, model.sharding).array
        token = (chosen + shift) % model.config.vocab_size
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, cache, token, tokens

    cache = Cache(layers, tag(jnp.full((rows,), start), "b"))
    begin = jnp.asarray(0, jnp.int32), cache, token, jnp.zeros((rows, most), jnp.int32)
    _, cache, _, tokens = lax.while_loop(lambda carry: carry[0] < steps, one, begin)
    return cache.layers, tokens


def _waves(like: jax.ShapeDtypeStruct, phase: jax.Array) -> jax.Array:
    """Numbers of about the size that keys and values have."""
    angle = jnp.broadcast_to(phase, like.shape)
    for axis, step in enumerate((0.7, 1.3, 0.37, 2.1)):
        angle += step * lax.broadcasted_iota(jnp.float32, like.shape, axis)
    return jnp.sin(angle).astype(like.dtype)


def compile_all(lowered: Sequence[Any], threads: int) -> list[Any]:
    """Compiles lowered programs side by side and waits for all, so that none disturbs a timing.

    One that cannot be compiled raises when it is called.
    """

    def compiled(program: Any) -> Any:
        try:
            return program.compile()
        except Exception as error:
            return functools.partial(_raise, error)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(compiled, lowered))


def _raise(error: Exception, *args: Any) -> Any:
    raise error


def bytes_per_device(tree: Any) -> list[int]:
    """How many bytes of the arrays of a pytree each device holds, in the order of devices."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return [held[device] for device in sorted(held, key=lambda device: device.id)]

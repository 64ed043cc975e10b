"""The gpt-oss transformer: attention with sinks and mixture-of-experts blocks.

A model is built from a function that gives each parameter by its Hugging Face name, so reading a
checkpoint, random initialisation and abstract shapes are the same declaration:

    model = GptOss(config, parameters)
    logits = model(tokens)                          # {b, s} -> {b, s, voc}, no cache
    logits, cache = model.step(tokens, cache)       # {b, s} -> {b, voc}, with a cache

Weights keep their dtype and are cast to the compute dtype where they are used. Normalisation,
softmax and routing are float32 always, and so are the logits.

References:
    gpt-oss, https://arxiv.org/abs/2508.10925
    RMSNorm, https://arxiv.org/abs/1910.07467
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt_oss.attention import Attention
from gpt_oss.cache import Cache, LayerCache, Span
from gpt_oss.config import GptOssConfig
from gpt_oss.embedding import embed
from gpt_oss.layers import Linear, RMSNorm
from gpt_oss.layout import Parameters, parameter_specs
from gpt_oss.overlap import apart, pieces
from gpt_oss.placement import constrained, constrained_cache
from gpt_oss.rope import Angles, cos_sin
from moe_jax import GPT_OSS_ACTIVATION, GptOssMLP, MoE, RouterStatistics, Tagged, tag
from moe_jax.quantization import Packed
from moe_jax.sharding import Sharding
from moe_jax.variables import param, value


class _Part(NamedTuple):
    """A piece of a chunk on its way through the layers: x {b, s, d}, where it stands, and which of
    its tokens are real, if not all."""

    x: Tagged
    angles: Angles
    span: Span
    mask: Tagged | None


class Block(nnx.Module):
    """One layer: attention, then the mixture of experts, each normalised and added.

    Attributes:
        input_layernorm, post_attention_layernorm: `RMSNorm`.
        self_attn: `Attention`.
        mlp: `moe_jax.MoE` of `GptOssMLP` experts.
    """

    def __init__(
        self,
        config: GptOssConfig,
        parameters: Parameters,
        layer: int,
        sharding: Sharding | None = None,
        **moe_options: Any,
    ) -> None:
        prefix = f"model.layers.{layer}."

        def norm(name: str) -> RMSNorm:
            return RMSNorm(parameters(f"{prefix}{name}.weight"), config.rms_norm_eps)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, parameters, layer, sharding)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = _mixture(config, parameters, f"{prefix}mlp.", sharding=sharding, **moe_options)

    def attend(
        self,
        x: Tagged,
        angles: Angles,
        cache: LayerCache | None = None,
        span: Span | None = None,
        reach: int | None = None,
    ) -> tuple[Tagged, LayerCache | None]:
        """The attention half: {b, s, d} -> {b, s, d} and the extended cache."""
        with jax.named_scope("attention"):
            y, cache = self.self_attn(self.input_layernorm(x), angles, cache, span, reach)
            return x + y, cache

    def mix(self, x: Tagged, token_mask: Tagged | None = None) -> Tagged:
        """The experts half: {b, s, d} -> {b, s, d}; masked tokens take no expert's room."""
        with jax.named_scope("experts"):
            return x + self.mlp(self.post_attention_layernorm(x), token_mask=token_mask)

    def mix_with_statistics(
        self, x: Tagged, token_mask: Tagged | None = None
    ) -> tuple[Tagged, RouterStatistics]:
        """The same, and the router's losses and counts."""
        with jax.named_scope("experts"):
            y, statistics = self.mlp.with_statistics(
                self.post_attention_layernorm(x), token_mask=token_mask
            )
            return x + y, statistics


class GptOss(nnx.Module):
    """A gpt-oss model.

    Attributes:
        embed_tokens: Param of {voc, d}.
        layers: list of `Block`.
        norm: `RMSNorm`.
        lm_head: `Linear` of {voc, d}.
        config: its shape.
        dtype: what it computes in.
        sharding: the devices that it is spread over, or None for one.
    """

    def __init__(
        self,
        config: GptOssConfig,
        parameters: Parameters,
        *,
        dtype: Any = jnp.bfloat16,
        sharding: Sharding | None = None,
        **moe_options: Any,
    ) -> None:
        """Asks `parameters` for each tensor once.

        Args:
            config: the shape.
            parameters: gives a tensor by its Hugging Face name; experts' projections (for example
                `model.layers.0.mlp.experts.gate_up_proj`) may be packed: `BlockScaled` or
                `TiledMXFP4`.
            dtype: what to compute in, float32 or bfloat16.
            sharding: the devices over which `parameters` are spread already, see `gpt_oss.mesh`.
            moe_options: `algorithm`, `tokens_per_expert_ratio`, `overflow` of `moe_jax.MoE`.

        Raises:
            ValueError: `dtype` is another, or a parameter does not have the axes and sizes that
                `config` says.
        """
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
        parameters = _checked(config, parameters)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.sharding = sharding
        self.embed_tokens = param(parameters("model.embed_tokens.weight"))
        self.layers = nnx.List(
            Block(config, parameters, layer, sharding, **moe_options)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(parameters("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = Linear(parameters("lm_head.weight"))

    def __call__(self, tokens: Tagged, *, token_mask: Tagged | None = None) -> Tagged:
        """Logits of what follows each token, without a cache.

        Args:
            tokens: int32 {b, s}, from position 0; padding, if any, on the right.
            token_mask: bool {b, s}; tokens that are False take no expert's room.

        Returns:
            float32 {b, s, voc}.

        Raises:
            ValueError: there are more tokens than the model has positions.
        """
        x, angles = self.begin(tokens)
        for index, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x = block.mix(block.attend(x, angles)[0], token_mask)
        return self.logits(x)

    def with_statistics(
        self, tokens: Tagged, *, token_mask: Tagged | None = None
    ) -> tuple[Tagged, list[RouterStatistics]]:
        """Logits as from a call, and the router's losses and counts of each block."""
        x, angles = self.begin(tokens)
        collected = []
        for index, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x, statistics = block.mix_with_statistics(block.attend(x, angles)[0], token_mask)
                collected.append(statistics)
        return self.logits(x), collected

    def step(
        self,
        tokens: Tagged,
        cache: Cache,
        *,
        count: Tagged | None = None,
        reach: int | None = None,
    ) -> tuple[Tagged, Cache]:
        """Continues each row of the cache with new tokens.

        The caller sees to it that no row passes the cache's context: what lies beyond is not
        written, and cannot raise inside jit.

        Args:
            tokens: int32 {b, s}; a row's padding is on the right.
            cache: what came before.
            count: int32 {b}, how many of a row's tokens are real; None for all.
            reach: full layers attend to positions below this only, which every row must stay
                below; None for the whole context. Static: each value compiles anew.

        Returns:
            Logits after each row's last real token, float32 {b, voc}, and the extended cache. A
            row without a real token gets logits that mean nothing.
        """
        size = tokens.size("s")
        if count is None:
            span = Span(cache.lengths, cache.lengths.map(lambda n: jnp.full_like(n, size)))
        else:
            span = Span(cache.lengths, count)
        parts = self._parts(tokens, span, masked=count is not None)
        layers = []
        for index, (block, held) in enumerate(zip(self.layers, cache.layers, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                for number, part in enumerate(parts):
                    once = apart(block) if number else block
                    x, held = once.attend(part.x, part.angles, held, part.span, reach)
                    parts[number] = part._replace(x=once.mix(x, part.mask))
                layers.append(constrained_cache(held, self.sharding))
        x = jnp.concatenate([part.x.untag("b", "s", "d") for part in parts], axis=1)
        last = jnp.maximum(span.count.untag("b") - 1, 0)[:, None, None]
        x = tag(jnp.take_along_axis(x, last, axis=1)[:, 0], "b", "d")
        return self.logits(x), Cache(tuple(layers), span.start + span.count)

    def _parts(self, tokens: Tagged, span: Span, masked: bool) -> list[_Part]:
        """What the layers begin with, in the pieces that they take one after the other."""
        size, parts = tokens.size("s"), []
        for first, end in pieces(tokens.size("b"), size, self.sharding):
            own = span if end - first == size else span.piece(first, end - first)
            x, angles = self.begin(tag(tokens.untag("b", "s")[:, first:end], "b", "s"), own)
            parts.append(_Part(x, angles, own, own.real(end - first) if masked else None))
        return parts

    def empty_cache(self, batch: int, context: int) -> Cache:
        """A cache in the compute dtype; see `Cache.empty`."""
        cache = Cache.empty(self.config, batch, context, self.dtype)
        layers = tuple(constrained_cache(layer, self.sharding) for layer in cache.layers)
        return Cache(layers, cache.lengths)

    def begin(self, tokens: Tagged, span: Span | None = None) -> tuple[Tagged, Angles]:
        """Embeddings {b, s, d} in the compute dtype, and the rotary angles of the positions."""
        size, most = tokens.size("s"), self.config.max_position_embeddings
        if size > most:
            raise ValueError(f"expected at most {most} tokens, the model's positions, got {size}")
        x = embed(value(self.embed_tokens), tokens, self.sharding).astype(self.dtype)
        x = constrained(x, self.sharding)
        if span is None:
            positions = tag(jnp.arange(size, dtype=jnp.int32), "s")
        else:
            positions = span.positions(size)
        return x, cos_sin(self.config, positions)

    def logits(self, x: Tagged) -> Tagged:
        """Logits, float32 {..., voc}, of what the last block returned, {..., d}."""
        with jax.named_scope("lm_head"):
            return constrained(self.lm_head(self.norm(x), "d", jnp.float32), self.sharding)


def _checked(config: GptOssConfig, parameters: Parameters) -> Parameters:
    """`parameters`, with a check that axes and sizes are those of the configuration."""
    specs = parameter_specs(config)

    def parameter(name: str) -> Any:
        value, spec = parameters(name), specs[name]
        expected = dict(zip(spec.axes, spec.shape, strict=True))
        if value.axes != spec.axes or value.sizes != expected:
            raise ValueError(f"{name}: expected the axes and sizes {expected}, got {value.sizes}")
        return value

    return parameter


def _mixture(config: GptOssConfig, parameters: Parameters, prefix: str, **options: Any) -> MoE:
    activation = dataclasses.replace(
        GPT_OSS_ACTIVATION, alpha=config.swiglu_alpha, limit=config.swiglu_limit
    )
    experts = f"{prefix}experts."
    gate_up: Tagged | Packed = parameters(f"{experts}gate_up_proj")
    down: Tagged | Packed = parameters(f"{experts}down_proj")
    return MoE(
        GptOssMLP(
            gate_up,
            parameters(f"{experts}gate_up_proj_bias"),
            down,
            parameters(f"{experts}down_proj_bias"),
            activation,
        ),
        parameters(f"{prefix}router.weight"),
        parameters(f"{prefix}router.bias"),
        experts_per_token=config.experts_per_token,
        **options,
    )

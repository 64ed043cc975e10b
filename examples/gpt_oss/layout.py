"""Every parameter of a gpt-oss model: name, axes, shape and how it starts.

The table is in floats. Where experts are stored as MXFP4, the entry `X` stands for the two tensors
`X_blocks` {expert, out, block, byte} and `X_scales` {expert, out, block}.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gpt_oss.config import GptOssConfig
from moe_jax.tagged import Tagged, tag


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        name: its Hugging Face name.
        axes: names of its axes, in the checkpoint's order. Merged axes name the slowest first:
            `h_hd` is heads x head_dim.
        shape: sizes of the axes.
        init: how it starts; `normal` has the configuration's `initializer_range`.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Literal["normal", "ones", "zeros"]


def parameter_specs(config: GptOssConfig) -> dict[str, ParameterSpec]:
    """All parameters by name: layer by layer, then what stands outside of layers."""
    specs = []
    for layer in range(config.num_hidden_layers):
        specs += _layer_specs(config, f"model.layers.{layer}.")
    table = (config.vocab_size, config.hidden_size)
    specs += [
        ParameterSpec("model.embed_tokens.weight", ("voc", "d"), table, "normal"),
        ParameterSpec("model.norm.weight", ("d",), (config.hidden_size,), "ones"),
        ParameterSpec("lm_head.weight", ("voc", "d"), table, "normal"),
    ]
    return {spec.name: spec for spec in specs}


def _layer_specs(config: GptOssConfig, prefix: str) -> list[ParameterSpec]:
    d, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    heads = config.num_attention_heads
    h_hd, kv_hd = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    table: dict[str, tuple[tuple[str, ...], tuple[int, ...], Literal["normal", "ones", "zeros"]]]
    table = {
        "input_layernorm.weight": (("d",), (d,), "ones"),
        "post_attention_layernorm.weight": (("d",), (d,), "ones"),
        "self_attn.q_proj.weight": (("h_hd", "d"), (h_hd, d), "normal"),
        "self_attn.q_proj.bias": (("h_hd",), (h_hd,), "zeros"),
        "self_attn.k_proj.weight": (("kv_hd", "d"), (kv_hd, d), "normal"),
        "self_attn.k_proj.bias": (("kv_hd",), (kv_hd,), "zeros"),
        "self_attn.v_proj.weight": (("kv_hd", "d"), (kv_hd, d), "normal"),
        "self_attn.v_proj.bias": (("kv_hd",), (kv_hd,), "zeros"),
        "self_attn.o_proj.weight": (("d", "h_hd"), (d, h_hd), "normal"),
        "self_attn.o_proj.bias": (("d",), (d,), "zeros"),
        "self_attn.sinks": (("h",), (heads,), "zeros"),
        "mlp.router.weight": (("expert", "d"), (experts, d), "normal"),
        "mlp.router.bias": (("expert",), (experts,), "zeros"),
        "mlp.experts.gate_up_proj": (("expert", "out", "in"), (experts, 2 * inner, d), "normal"),
        "mlp.experts.gate_up_proj_bias": (("expert", "out"), (experts, 2 * inner), "zeros"),
        "mlp.experts.down_proj": (("expert", "out", "in"), (experts, d, inner), "normal"),
        "mlp.experts.down_proj_bias": (("expert", "out"), (experts, d), "zeros"),
    }
    return [ParameterSpec(prefix + name, *entry) for name, entry in table.items()]


def random_parameters(
    config: GptOssConfig, seed: int, dtype: Any = jnp.bfloat16
) -> Callable[[str], Tagged]:
    """Gives random initial parameters by name.

    A parameter depends on the seed, its name and its shape, not on the order of asking.

    Raises:
        KeyError: from the returned function, for a name the model does not have.
    """
    specs, key = parameter_specs(config), jax.random.key(seed)

    def parameter(name: str) -> Tagged:
        spec = specs[name]
        if spec.init != "normal":
            value = {"ones": 1.0, "zeros": 0.0}[spec.init]
            return tag(jnp.full(spec.shape, value, dtype), *spec.axes)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        normal = jax.random.normal(own, spec.shape, jnp.float32) * config.initializer_range
        return tag(normal.astype(dtype), *spec.axes)

    return parameter


def abstract_parameters(config: GptOssConfig, dtype: Any = jnp.bfloat16) -> Callable[[str], Tagged]:
    """Gives shapes and dtypes by name, without memory behind them."""
    specs = parameter_specs(config)

    def parameter(name: str) -> Tagged:
        return Tagged(jax.ShapeDtypeStruct(specs[name].shape, dtype), specs[name].axes)

    return parameter

"""The parameters of a gpt-oss model: their names in checkpoints, axes, shapes and first values.

Loading, random initialisation, writing and sharding all go by this one list. It is the float view:
where an experts' weight is stored in MXFP4, two tensors, with `_blocks` and `_scales` after the
name, stand for it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from gpt_oss.config import GptOssConfig

type Init = Literal["normal", "ones", "zeros"]

type Parameters = Callable[[str], Any]
"""Gives a parameter, `Tagged` or a packed weight, by its Hugging Face name."""


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        name: its name in Hugging Face checkpoints.
        axes: axis tags, slowest first.
        shape: the size of each axis.
        init: how random initialisation fills it: "normal" has the standard deviation
            `GptOssConfig.initializer_range`.
        is_whole: whether every device needs all of it, however arrays are spread: every token meets
            the whole router, whoever has the experts.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Init
    is_whole: bool = False

    @property
    def is_expert_weight(self) -> bool:
        """Whether it is one of the matrices that checkpoints may hold in MXFP4."""
        return self.axes == ("expert", "out", "in")


def parameter_specs(config: GptOssConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the model by name, in the order of the forward pass."""
    table = (config.vocab_size, config.hidden_size)
    specs = [ParameterSpec("model.embed_tokens.weight", ("voc", "d"), table, "normal")]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for part in (*_attention_specs(config), *_experts_specs(config)):
            specs.append(dataclasses.replace(part, name=prefix + part.name))
    specs.append(_norm("model.norm.weight", config))
    specs.append(ParameterSpec("lm_head.weight", ("voc", "d"), table, "normal"))
    return {spec.name: spec for spec in specs}


def _norm(name: str, config: GptOssConfig) -> ParameterSpec:
    return ParameterSpec(name, ("d",), (config.hidden_size,), "ones")


def _attention_specs(config: GptOssConfig) -> Iterator[ParameterSpec]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    widths = {
        "h_hd": heads * config.head_dim,
        "kv_hd": config.num_key_value_heads * config.head_dim,
    }
    yield _norm("input_layernorm.weight", config)
    for part, axis in (("q", "h_hd"), ("k", "kv_hd"), ("v", "kv_hd")):
        name = f"self_attn.{part}_proj."
        yield ParameterSpec(name + "weight", (axis, "d"), (widths[axis], hidden), "normal")
        yield ParameterSpec(name + "bias", (axis,), (widths[axis],), "zeros")
    yield ParameterSpec("self_attn.sinks", ("h",), (heads,), "normal")
    yield ParameterSpec(
        "self_attn.o_proj.weight", ("d", "h_hd"), (hidden, widths["h_hd"]), "normal"
    )
    yield ParameterSpec("self_attn.o_proj.bias", ("d",), (hidden,), "zeros")


def _experts_specs(config: GptOssConfig) -> Iterator[ParameterSpec]:
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    yield _norm("post_attention_layernorm.weight", config)
    router = ParameterSpec("mlp.router.weight", ("expert", "d"), (experts, hidden), "normal", True)
    yield router
    yield ParameterSpec("mlp.router.bias", ("expert",), (experts,), "zeros", True)
    for part, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        name = f"mlp.experts.{part}"
        yield ParameterSpec(name, ("expert", "out", "in"), (experts, rows, columns), "normal")
        yield ParameterSpec(name + "_bias", ("expert", "out"), (experts, rows), "zeros")

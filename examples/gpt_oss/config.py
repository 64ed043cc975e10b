"""The shape of a gpt-oss model, read from config.json and checked.

Both spellings in circulation are understood: that of the released files (`rope_theta`,
`rope_scaling`, `experts_per_token`) and that of transformers 5 (`rope_parameters` with the theta
inside, `num_experts_per_tok`). A value the model cannot honour is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gpt_oss import fields
from gpt_oss.yarn import YarnScaling
from moe_jax.activations import GPT_OSS_ACTIVATION
from moe_jax.checkpoint import ConfigError
from moe_jax.quantization import BLOCK_SIZE

SLIDING, FULL = "sliding_attention", "full_attention"

REQUIRED_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "layer_types",
    "sliding_window",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "swiglu_limit",
)
"""Keys a config.json must have. `experts_per_token` serves for `num_experts_per_tok`, and
`rope_parameters` for the two rope keys. An end-of-sequence id must be here or in
generation_config.json."""

_FIXED = {
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """The shape of a gpt-oss model.

    Attributes:
        vocab_size: rows of the embedding and of the output layer.
        hidden_size: features of a token between layers.
        intermediate_size: features inside an expert, after the gate.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: features of a head, even.
        num_experts: experts of each block (`num_local_experts` in config.json).
        experts_per_token: experts a token is sent to (`num_experts_per_tok`).
        layer_types: `sliding_attention` or `full_attention`, one for each block.
        sliding_window: keys a query of a sliding block sees, its own included.
        max_position_embeddings: longest sequence, in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: YaRN, or None for plain rotary positions.
        rms_norm_eps: added to the mean square before its root is taken.
        swiglu_limit: clamp of both lanes of an expert's activation.
        swiglu_alpha: slope inside the activation's sigmoid.
        eos_token_ids: ids that end a sequence, ascending; those of config.json and of
            generation_config.json together.
        pad_token_id: id for padding, or None.
        initializer_range: standard deviation of random initial weights.
        router_aux_loss_coef: weight of the load balance loss in training.
        quant_method: `mxfp4` where the released experts are stored packed, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    layer_types: tuple[str, ...]
    sliding_window: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    rms_norm_eps: float
    swiglu_limit: float
    eos_token_ids: tuple[int, ...]
    swiglu_alpha: float = GPT_OSS_ACTIVATION.alpha
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.0
    quant_method: str | None = None

    def __post_init__(self) -> None:
        _check_relations(self)

    def window(self, layer: int) -> int | None:
        """The sliding window of a block in tokens, None where it sees everything before."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Reads config.json and, where present, generation_config.json of a checkpoint folder.

        Raises:
            ConfigError: a file cannot be read or holds a value the model cannot honour.
        """
        folder = Path(path)
        generation = folder / "generation_config.json"
        return cls.from_dict(
            fields.read_json(folder / "config.json"),
            fields.read_json(generation) if generation.exists() else None,
        )

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Builds the configuration from the contents of config.json.

        Args:
            config: config.json as a dictionary.
            generation_config: generation_config.json as a dictionary; only its
                `eos_token_id` is read.

        Raises:
            ConfigError: names the key, what was expected and what came.
        """
        _check_supported(config)
        theta, scaling = _rope(config)
        return cls(
            vocab_size=fields.integer(config, "vocab_size"),
            hidden_size=fields.integer(config, "hidden_size"),
            intermediate_size=fields.integer(config, "intermediate_size"),
            num_hidden_layers=fields.integer(config, "num_hidden_layers"),
            num_attention_heads=fields.integer(config, "num_attention_heads"),
            num_key_value_heads=fields.integer(config, "num_key_value_heads"),
            head_dim=fields.integer(config, "head_dim"),
            num_experts=fields.integer(config, "num_local_experts"),
            experts_per_token=_experts_per_token(config),
            layer_types=_layer_types(config),
            sliding_window=fields.integer(config, "sliding_window"),
            max_position_embeddings=fields.integer(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=fields.number(config, "rms_norm_eps"),
            swiglu_limit=fields.number(config, "swiglu_limit"),
            swiglu_alpha=fields.number(config, "swiglu_alpha", GPT_OSS_ACTIVATION.alpha),
            eos_token_ids=_eos_ids(config, generation_config),
            pad_token_id=fields.optional_id(config, "pad_token_id"),
            initializer_range=fields.number(config, "initializer_range", default=0.02),
            router_aux_loss_coef=fields.number(config, "router_aux_loss_coef", 0.0, minimum=0.0),
            quant_method=_quant_method(config),
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json in the released form; `from_dict` reads it back."""
        scaling: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            scaling = {"rope_type": "yarn", **dataclasses.asdict(self.rope_scaling)}
            if scaling["attention_factor"] is None:
                del scaling["attention_factor"]
        eos = self.eos_token_ids
        out: dict[str, Any] = {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "experts_per_token": self.experts_per_token,
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rms_norm_eps": self.rms_norm_eps,
            "swiglu_limit": self.swiglu_limit,
            "swiglu_alpha": self.swiglu_alpha,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
            "pad_token_id": self.pad_token_id,
            "initializer_range": self.initializer_range,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            **_FIXED,
        }
        if self.rope_scaling is not None:
            out["initial_context_length"] = self.rope_scaling.original_max_position_embeddings
        if self.quant_method is not None:
            out["quantization_config"] = {
                "quant_method": self.quant_method,
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            }
        return out


def _check_supported(config: Mapping[str, Any]) -> None:
    """Checks the values that gpt-oss has only one of."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: expected a dictionary, got {type(config).__name__}")
    model_type = fields.required(config, "model_type", "'gpt_oss'")
    if model_type != "gpt_oss":
        raise fields.error("model_type", "'gpt_oss'", model_type)
    for key, only in _FIXED.items():
        value = config.get(key, only)
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            raise fields.error(key, f"{only!r}, the only value gpt-oss models have", value)
    rope = config.get("rope_parameters")
    for source in (config, rope if isinstance(rope, Mapping) else {}):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor", "1.0", source["partial_rotary_factor"])
    experts = config.get("num_local_experts")
    if config.get("num_experts", experts) != experts:
        raise fields.error(
            "num_experts", f"{experts}, as num_local_experts says", config["num_experts"]
        )


def _experts_per_token(config: Mapping[str, Any]) -> int:
    names = [k for k in ("num_experts_per_tok", "experts_per_token") if k in config]
    values = [fields.integer(config, name) for name in names or ["num_experts_per_tok"]]
    if len(set(values)) > 1:
        raise fields.error(names[1], f"{values[0]}, as {names[0]} says", values[1])
    return values[0]


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    expected = f"a list of {SLIDING!r} and {FULL!r}"
    value = fields.required(config, "layer_types", expected)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise fields.error("layer_types", expected, value)
    for kind in value:
        if kind not in (SLIDING, FULL):
            raise fields.error("layer_types", expected, kind)
    return tuple(value)


def _rope(config: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """Theta and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    scaling = fields.required(config, key, "an object, or null for plain rotary positions")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise fields.error(key, "an object", scaling)
    if key == "rope_parameters" and scaling is not None:
        _check_agrees(config, scaling)
    if scaling is None:
        return _theta(config), None
    theta = _theta(scaling if "rope_theta" in scaling else config)
    expected = "'yarn' or 'default'"
    kind = fields.required(scaling, "rope_type", expected)
    if kind not in ("yarn", "default"):
        raise fields.error(f"{key}.rope_type", expected, kind)
    return theta, YarnScaling.from_dict(scaling, key) if kind == "yarn" else None


def _check_agrees(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Checks that the older keys, where they are there too, say what `rope_parameters` says."""
    inside = {name: value for name, value in parameters.items() if name != "rope_theta"}
    for name, same in (("rope_theta", parameters.get("rope_theta")), ("rope_scaling", inside)):
        if config.get(name) is not None and config[name] != same and same is not None:
            raise fields.error(name, f"{same}, as rope_parameters says", config[name])


def _theta(source: Mapping[str, Any]) -> float:
    theta = fields.number(source, "rope_theta")
    if theta <= 1:
        raise fields.error("rope_theta", "a number above 1", theta)
    return theta


def _eos_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> tuple[int, ...]:
    found: set[int] = set()
    for source in (config, generation_config or {}):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, Sequence) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                raise fields.error("eos_token_id", "a token id or a list of them", value)
            found.add(token)
    if not found:
        raise ConfigError(
            "eos_token_id is missing: expected at least one token id in config.json or "
            "generation_config.json, or generation would never end"
        )
    return tuple(sorted(found))


def _quant_method(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise fields.error("quantization_config", "an object", quantization)
    method = quantization.get("quant_method")
    if method != "mxfp4":
        raise fields.error("quantization_config.quant_method", "'mxfp4'", method)
    return method


def _check_relations(config: GptOssConfig) -> None:
    """Checks that the sizes fit each other."""
    c = config
    if c.experts_per_token > c.num_experts:
        raise fields.error(
            "num_experts_per_tok", f"at most num_local_experts={c.num_experts}", c.experts_per_token
        )
    if c.num_attention_heads % c.num_key_value_heads:
        raise fields.error(
            "num_attention_heads",
            f"a multiple of num_key_value_heads={c.num_key_value_heads}",
            c.num_attention_heads,
        )
    if c.head_dim % 2:
        raise fields.error("head_dim", "an even number, for rotary halves", c.head_dim)
    for key in ("hidden_size", "intermediate_size"):
        if getattr(c, key) % BLOCK_SIZE:
            raise fields.error(key, f"a multiple of the MXFP4 block {BLOCK_SIZE}", getattr(c, key))
    if len(c.layer_types) != c.num_hidden_layers:
        raise fields.error(
            "layer_types", f"num_hidden_layers={c.num_hidden_layers} entries", len(c.layer_types)
        )
    if not c.eos_token_ids:
        raise fields.error("eos_token_id", "at least one token id", c.eos_token_ids)
    ids = [("eos_token_id", token) for token in c.eos_token_ids]
    if c.pad_token_id is not None:
        ids.append(("pad_token_id", c.pad_token_id))
    for key, token in ids:
        if not 0 <= token < c.vocab_size:
            raise fields.error(key, f"an id below vocab_size={c.vocab_size}", token)

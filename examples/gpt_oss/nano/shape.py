"""The shape of gpt-oss-nano: gpt-oss in small, so that its packed checkpoint is a few megabytes."""

from collections.abc import Mapping

from gpt_oss.config import FULL, SLIDING, GptOssConfig, YarnScaling


def nano_config(control_tokens: Mapping[str, int]) -> GptOssConfig:
    """The configuration for a vocabulary whose control tokens have these ids."""
    return GptOssConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        experts_per_token=4,
        layer_types=(SLIDING, FULL) * 3,
        sliding_window=128,
        max_position_embeddings=4096,
        rope_theta=150000.0,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=1024, truncate=False),
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        eos_token_ids=tuple(
            sorted(control_tokens[n] for n in ("<|return|>", "<|endoftext|>", "<|call|>"))
        ),
        pad_token_id=control_tokens["<|endoftext|>"],
        router_aux_loss_coef=0.01,
        quant_method="mxfp4",
    )

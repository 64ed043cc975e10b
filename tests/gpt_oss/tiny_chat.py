"""A tiny checkpoint that has a tokenizer, and an engine that says what it is told to."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import o200k

from gpt_oss.config import FULL, SLIDING, GptOssConfig, YarnScaling
from gpt_oss.generation import Generation, Statistics
from gpt_oss.initialization import random_parameters
from gpt_oss.sampling import Greedy, Sampler
from gpt_oss.tokenizer import CONTROL_NAMES, Tokenizer
from gpt_oss.writer import write_checkpoint
from moe_jax import quantize_mxfp4

CONTEXT = 2048
_NAMES = list(CONTROL_NAMES.values())
MODEL_EOS = "<|startoftext|>"
"""A token that ends a text for this model, though not in the harmony format."""

EOS_NAMES = ("<|return|>", "<|call|>", "<|endoftext|>", MODEL_EOS)

CONFIG = GptOssConfig(
    vocab_size=len(_NAMES) + 256,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    num_experts=5,
    experts_per_token=3,
    layer_types=(SLIDING, FULL),
    sliding_window=16,
    max_position_embeddings=CONTEXT,
    rope_theta=1000.0,
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=512, truncate=False),
    rms_norm_eps=1e-5,
    swiglu_limit=7.0,
    eos_token_ids=tuple(sorted(_NAMES.index(name) for name in EOS_NAMES)),
    initializer_range=0.3,
    quant_method="mxfp4",
)


def write(folder: Path, config: GptOssConfig = CONFIG) -> Path:
    """Writes a checkpoint with random weights, its experts in MXFP4, and a tokenizer of bytes."""
    parameters = random_parameters(config, seed=5)

    def packed(name: str):
        is_expert = name.endswith(("gate_up_proj", "down_proj"))
        return quantize_mxfp4(parameters(name)) if is_expert else parameters(name)

    write_checkpoint(folder, config, packed)
    o200k.write_small(folder, _NAMES)
    return folder


def control_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which the names of control tokens stand for these tokens."""
    ids, rest = [], text
    while rest:
        name = next((name for name in _NAMES if rest.startswith(name)), None)
        ids += [_NAMES.index(name)] if name else tokenizer.encode(rest[0])
        rest = rest.removeprefix(name) if name else rest[1:]
    return ids


@dataclasses.dataclass
class ScriptedEngine:
    """Generates texts given beforehand, one a call, and ends them as the real engine would.

    Attributes:
        tokenizer: of the texts.
        script: what to generate; names of control tokens stand for these tokens, and ^C for the
            user's interrupt.
        context: most tokens of prompt and answer.
        prompts: the prompts that came, as text.
        options: sampler, limit and seed of each call.
    """

    tokenizer: Tokenizer
    script: list[str] = dataclasses.field(default_factory=list)
    context: int = CONTEXT
    prompts: list[str] = dataclasses.field(default_factory=list)
    options: list[tuple[Greedy | Sampler, int | None, int]] = dataclasses.field(
        default_factory=list
    )

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampler: Greedy | Sampler,
        *,
        max_tokens: int | None,
        stop_ids: Sequence[int] | None,
        seed: int,
    ) -> Generation:
        """The next text of the script."""
        self.prompts.append(self.tokenizer.decode(prompt_ids))
        self.options.append((sampler, max_tokens, seed))
        statistics = Statistics(prompt_tokens=len(prompt_ids), first_token_seconds=0.25)
        text, interrupt, _ = self.script.pop(0).partition("^C")
        ids = control_ids(text, self.tokenizer)

        def tokens() -> Iterator[int]:
            for token in itertools.islice(ids, max_tokens):
                statistics.generated_tokens += 1
                yield token
                if token in (stop_ids or ()):
                    return
            if interrupt:
                raise KeyboardInterrupt

        return Generation(tokens(), statistics)

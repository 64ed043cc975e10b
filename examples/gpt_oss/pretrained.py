"""A checkpoint made ready to use: model, tokenizer and engine together.

See the package's docstring for examples.
"""

import dataclasses
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss.config import GptOssConfig
from gpt_oss.engine import Engine
from gpt_oss.errors import UserError
from gpt_oss.harmony import DeveloperConfig, SystemConfig
from gpt_oss.loader import load_model
from gpt_oss.model import GptOss
from gpt_oss.placement import on_every_device
from gpt_oss.session import ChatSession, Options, TextSession
from gpt_oss.source import DEFAULT, Source, resolve
from gpt_oss.tokenizer import Tokenizer
from moe_jax.checkpoint import Checkpoint, CheckpointError
from moe_jax.sharding import Sharding
from moe_jax.tagged import tag

DEFAULT_CONTEXT = 8192
"""Tokens of a sequence unless asked for otherwise or the model has fewer."""

FLOAT32_LIMIT = 2**30
"""Bytes up to which float weights are computed with in float32 on a CPU."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to generate.

    Attributes:
        name: what it is called.
        config: its shape.
        model: the model.
        tokenizer: its tokenizer.
        engine: generates with it.
    """

    name: str
    config: GptOssConfig
    model: GptOss
    tokenizer: Tokenizer
    engine: Engine

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of what follows each token, float32 [tokens, vocabulary].

        Each new number of tokens compiles anew.

        Raises:
            TypeError: an id is not an integer.
            ValueError: there are no ids, one is not in the vocabulary, or they are more than the
                model has positions.
        """
        size, listed = self.config.vocab_size, [operator.index(token) for token in ids]
        if not listed or not all(0 <= token < size for token in listed):
            raise ValueError(f"expected token ids, at least one, of 0 to {size - 1}, got {listed}")
        tokens = tag(jnp.asarray([listed], jnp.int32), "b", "s")
        return np.asarray(_logits(self.model, tokens).untag("b", "s", "voc")[0])

    def generate(self, prompt: str, options: Options = Options()) -> str:  # noqa: B008 - frozen
        """The answer to a prompt in the chat format, without the reasoning."""
        return self.chat().reply(prompt, options).read()

    def complete(self, text: str, options: Options = Options()) -> str:  # noqa: B008 - frozen
        """What follows a text; it is not in the chat format."""
        return self.text().reply(text, options).read()

    def chat(
        self,
        *,
        system: SystemConfig | None = None,
        developer: str | DeveloperConfig | None = None,
    ) -> ChatSession:
        """A new conversation, see `ChatSession`."""
        return ChatSession(
            self.engine,
            self.tokenizer,
            system=system,
            developer=developer,
            stop_ids=self.config.eos_token_ids,
        )

    def text(self) -> TextSession:
        """Continuation without a chat format, see `TextSession`."""
        return TextSession(self.engine, self.tokenizer, self.config.eos_token_ids)


@jax.jit
def _logits(model: GptOss, tokens: Any) -> Any:
    return on_every_device(model(tokens), model.sharding)


def load(
    model: str | os.PathLike[str] | Source = DEFAULT,
    *,
    dtype: str = "auto",
    context: int | None = None,
    offline: bool = False,
    progress: bool = False,
    sharding: Sharding | None = None,
    prepare: bool | None = None,
    **moe_options: Any,
) -> Pretrained:
    """Loads a model by name.

    Args:
        model: a folder, or a name as `source.resolve` takes it, or what that returned.
        dtype: what to compute in and to hold float weights in: `float32`, `bfloat16`, or `auto`,
            see `choose_dtype`. Experts in MXFP4 stay packed.
        context: most tokens of a sequence; None for those of the model, but at most
            `DEFAULT_CONTEXT`.
        offline: download nothing.
        progress: show downloads and loading on stderr.
        sharding: the devices to spread the model over, see `gpt_oss.mesh`; None puts it on the
            default device.
        prepare: whether packed experts are laid out for NVIDIA GPUs, see `loader.load_model`.
        moe_options: `algorithm` and `tokens_per_expert_ratio` of `moe_jax.MoE`.

    Raises:
        UserError: there is no such model, or it cannot do what is asked for.
        ConfigError, CheckpointError: its files are missing or damaged.
    """
    if not isinstance(model, Source):
        model = resolve(os.fspath(model), offline=offline, progress=progress)
    config = GptOssConfig.from_folder(model.folder)
    tokenizer = Tokenizer(model.folder)
    _check_vocabulary(model.folder, tokenizer, config)
    size = _context(context, config)
    if dtype == "auto":
        dtype = choose_dtype(Checkpoint.open(model.folder))
    if dtype not in DTYPES:
        raise UserError(f"dtype must be 'auto' or one of {tuple(DTYPES)}, got {dtype!r}")
    network = load_model(
        model.folder,
        dtype=DTYPES[dtype],
        sharding=sharding,
        progress=progress,
        prepare=prepare,
        **moe_options,
    )
    return Pretrained(model.name, config, network, tokenizer, Engine(network, context=size))


def choose_dtype(checkpoint: Checkpoint) -> str:
    """`bfloat16` on a GPU or TPU.

    On a CPU `float32`, which is faster there, while float weights then take less than
    `FLOAT32_LIMIT` bytes.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    floats = [t for t in checkpoint.tensors.values() if t.dtype_name in ("BF16", "F16", "F32")]
    return "float32" if 4 * sum(math.prod(t.shape) for t in floats) < FLOAT32_LIMIT else "bfloat16"


def _context(context: int | None, config: GptOssConfig) -> int:
    longest = config.max_position_embeddings
    if context is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 2 <= context <= longest:
        raise UserError(f"context must be between 2 and {longest}, the model's most; got {context}")
    return context


def _check_vocabulary(folder: Path, tokenizer: Tokenizer, config: GptOssConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has ids up to {tokenizer.vocab_size - 1}, config.json says "
            f"vocab_size {config.vocab_size}: they belong to different models"
        )

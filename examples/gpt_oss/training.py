"""Training a small gpt-oss: batches, loss and the steps of the optimiser.

The parameters are a dictionary by Hugging Face name, which is what a model is built from, so a
model is made inside the loss and a checkpoint is the dictionary. A step depends on the state and
its number alone: a run that is resumed continues as if it had not stopped.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_oss.config import GptOssConfig
from gpt_oss.model import GptOss
from moe_jax import fake_quantize_mxfp4
from moe_jax.tagged import Tagged, tag

type ParameterDict = dict[str, Tagged]

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""How the names of weights end that become MXFP4."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: number of updates.
        text_rows: rows of plain text in a batch.
        chat_rows: rows of chats in a batch.
        length: tokens of a row.
        learning_rate: its peak; it rises over `warmup` steps and falls to zero along a cosine.
        warmup: steps until the peak.
        weight_decay: of matrices, embeddings excepted.
        dropout: share of features dropped after the embedding and after each half block.
        load_balance: weight of the load-balance loss.
        router_z: weight of the router's z-loss.
        quantize_from: share of the steps after which the experts are rounded to MXFP4 in the
            forward pass, so that the model learns to live with it; 1 for never.
        algorithm: how experts are dispatched.
        seed: of parameters, batches and dropout.
    """

    steps: int = 6000
    text_rows: int = 48
    chat_rows: int = 24
    length: int = 512
    learning_rate: float = 4e-3
    warmup: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.2
    load_balance: float = 0.01
    router_z: float = 0.001
    quantize_from: float = 0.7
    algorithm: str = "dense"
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything that is trained on.

    Attributes:
        text: int32 [n], documents one after the other.
        chats: int32 [rows, length].
        chat_mask: bool [rows, length], the tokens whose prediction is scored.
    """

    text: jax.Array
    chats: jax.Array
    chat_mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What a run consists of between two steps.

    Attributes:
        parameters: float32.
        optimizer: the state of `optimizer(config)`.
        step: int32 scalar, updates done.
    """

    parameters: ParameterDict
    optimizer: optax.OptState
    step: jax.Array


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warmup and a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, max(config.steps, config.warmup + 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay, mask=_decayed),
    )


def initial_state(parameters: ParameterDict, config: TrainingConfig) -> TrainingState:
    """The state before the first step."""
    values: Any = parameters  # optax's types know no pytrees of one's own
    return TrainingState(parameters, optimizer(config).init(values), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("model_config", "config", "count", "quantize"), donate_argnums=0)
def train_steps(
    state: TrainingState,
    data: TrainingData,
    *,
    model_config: GptOssConfig,
    config: TrainingConfig,
    count: int,
    quantize: bool,
) -> tuple[TrainingState, dict[str, jax.Array]]:
    """`count` updates in one call; returns the new state and each step's losses [count]."""
    update = optimizer(config).update

    def step(state: TrainingState, _: None) -> tuple[TrainingState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch_key, dropout_key = jax.random.split(key)
        rows, scored = sample_batch(data, config, batch_key)
        gradient, losses = jax.grad(loss, has_aux=True)(
            state.parameters, rows, scored, dropout_key, model_config, config, quantize
        )
        parameters: Any = state.parameters
        updates, optimizer_state = update(gradient, state.optimizer, parameters)
        parameters = optax.apply_updates(parameters, updates)
        return TrainingState(parameters, optimizer_state, state.step + 1), losses

    return jax.lax.scan(step, state, length=count)


def sample_batch(
    data: TrainingData, config: TrainingConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows int32 [b, length] of text and chats, and which tokens are scored, bool [b, length]."""
    text_key, chat_key = jax.random.split(key)
    starts = jax.random.randint(
        text_key, (config.text_rows, 1), 0, data.text.shape[0] - config.length
    )
    text = data.text[starts + jnp.arange(config.length)[None, :]]
    chosen = jax.random.randint(chat_key, (config.chat_rows,), 0, data.chats.shape[0])
    rows = jnp.concatenate([text, data.chats[chosen]])
    scored = jnp.concatenate([jnp.ones(text.shape, bool), data.chat_mask[chosen]])
    return rows, scored


def loss(
    parameters: ParameterDict,
    rows: jax.Array,
    scored: jax.Array,
    key: jax.Array,
    model_config: GptOssConfig,
    config: TrainingConfig,
    quantize: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss of a batch and its parts."""
    model = build(parameters, model_config, config.algorithm, quantize)
    logits, balance, z = _forward(model, rows[:, :-1], key, config.dropout)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    mask = scored[:, 1:].astype(jnp.float32)
    text = (cross_entropy * mask).sum() / mask.sum()
    total = text + config.load_balance * balance + config.router_z * z
    return total, {"loss": text, "load_balance": balance, "router_z": z}


def build(
    parameters: ParameterDict, model_config: GptOssConfig, algorithm: str, quantize: bool
) -> GptOss:
    """The float32 model of these parameters; `quantize` rounds the experts to MXFP4."""

    def get(name: str) -> Tagged:
        if quantize and name.endswith(EXPERT_WEIGHTS):
            return fake_quantize_mxfp4(parameters[name])
        return parameters[name]

    return GptOss(model_config, get, dtype=jnp.float32, algorithm=algorithm)


def _forward(
    model: GptOss, tokens: jax.Array, key: jax.Array, dropout: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [b, s, voc] with dropout, and the mean load-balance and z losses of the blocks."""
    keys = iter(jax.random.split(key, 2 * len(model.layers) + 1))
    x, angles = model.begin(tag(tokens, "b", "s"))
    x = _drop(x, next(keys), dropout)
    balance, z = [], []
    for block in model.layers:
        x = x + _drop(block.attend(x, angles)[0] - x, next(keys), dropout)
        y, statistics = block.mix_with_statistics(x)
        x = x + _drop(y - x, next(keys), dropout)
        balance.append(statistics.load_balance)
        z.append(statistics.z)
    logits = model.logits(x).untag("b", "s", "voc")
    return logits, jnp.stack(balance).mean(), jnp.stack(z).mean()


def _drop(x: Tagged, key: jax.Array, rate: float) -> Tagged:
    if not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return x.map(lambda array: jnp.where(kept, array / (1 - rate), 0.0))


def _decayed(parameters: ParameterDict) -> dict[str, bool]:
    return {
        name: len(value.axes) > 1 and not name.endswith(("bias", "embed_tokens.weight"))
        for name, value in parameters.items()
    }


def load_data(folder: Path, length: int) -> TrainingData:
    """Reads train.npy and chats.npz as `gpt_oss.nano.prepare` writes them.

    Raises:
        ValueError: the chats' rows are not `length` tokens long.
    """
    text = np.load(folder / "train.npy").astype(np.int32)
    with np.load(folder / "chats.npz") as chats:
        ids, mask = chats["ids"].astype(np.int32), chats["mask"].astype(bool)
    if ids.shape[1] != length:
        raise ValueError(f"expected chats of {length} tokens a row, got {ids.shape[1]}")
    return TrainingData(jnp.asarray(text), jnp.asarray(ids), jnp.asarray(mask))

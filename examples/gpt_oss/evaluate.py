"""How well a model predicts text it has not seen, in bits per byte."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss.model import GptOss
from moe_jax.tagged import Tagged, tag


def bits_per_byte(
    model: GptOss,
    tokens: np.ndarray,
    num_bytes: int,
    *,
    length: int = 512,
    stride: int = 256,
    batch: int = 8,
) -> float:
    """The model's code length of a text over the text's length.

    Windows of `length` tokens start every `stride` tokens; each scores what the window before it
    did not, so that all but the first tokens have at least `length - stride` tokens of context.

    Args:
        model: the model; how its experts are dispatched matters where it has a fixed budget.
        tokens: integers [n], the text with its delimiters, which count as text.
        num_bytes: bytes of the text without delimiters.
        length: tokens in a window.
        stride: tokens between the starts of windows.
        batch: windows that are computed together.

    Returns:
        Bits per byte.

    Raises:
        ValueError: fewer tokens than a window, or a stride that leaves gaps.
    """
    if not 0 < stride < length or len(tokens) <= length:
        raise ValueError(
            f"expected 0 < stride < length < number of tokens, "
            f"got {stride}, {length} and {len(tokens)}"
        )
    starts = list(range(0, len(tokens) - 1, stride))
    total = 0.0
    for first in range(0, len(starts), batch):
        windows, scored = _windows(tokens, starts[first : first + batch], length, stride, batch)
        total += float(_code_length(model, tag(windows, "b", "s"), tag(scored, "b", "s")))
    return total / math.log(2) / num_bytes


def token_losses(model: GptOss, windows: Tagged) -> Tagged:
    """-log p of each token of {b, s} from the second on: float32 {b, s - 1}."""
    ids = windows.untag("b", "s")
    logits = model(tag(ids[:, :-1], "b", "s")).untag("b", "s", "voc")
    picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return tag(jax.nn.logsumexp(logits, axis=-1) - picked, "b", "s")


@jax.jit
def _code_length(model: GptOss, windows: Tagged, scored: Tagged) -> jax.Array:
    losses = token_losses(model, windows).array
    return jnp.where(scored.array[:, 1:], losses, 0.0).sum()


def _windows(
    tokens: np.ndarray, starts: list[int], length: int, stride: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows int32 [batch, length] and which of their tokens to score, bool of that shape."""
    windows = np.zeros((batch, length), np.int32)
    scored = np.zeros((batch, length), bool)
    for row, start in enumerate(starts):
        piece = tokens[start : start + length]
        windows[row, : len(piece)] = piece
        scored[row, (length - stride if start else 1) : len(piece)] = True
    return windows, scored

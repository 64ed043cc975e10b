"""How well a model predicts text it has not seen, in bits per byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss.model import GptOss
from moe_jax.tagged import Tagged, tag


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model did on a text.

    Attributes:
        bits_per_byte: the model's code length of the text over the text's length.
        rerouted: share of the (token, expert) pairs that went to another expert than the first
            choice, over all layers.
        dropped: share of the pairs that no expert computed.
    """

    bits_per_byte: float
    rerouted: float
    dropped: float


def evaluate(
    model: GptOss,
    tokens: np.ndarray,
    num_bytes: int,
    *,
    length: int = 512,
    stride: int = 256,
    batch: int = 8,
) -> Evaluation:
    """Runs a model over a text in windows.

    Windows of `length` tokens start every `stride` tokens; each scores what the window before it
    did not, so that all but the first tokens have at least `length - stride` tokens of context.

    Args:
        model: the model; with a fixed budget, what it predicts depends on `batch` too.
        tokens: integers [n], the text with its delimiters, which count as text.
        num_bytes: bytes of the text without delimiters.
        length: tokens in a window.
        stride: tokens between the starts of windows.
        batch: windows that are computed together.

    Raises:
        ValueError: fewer tokens than a window, or a stride that leaves gaps.
    """
    if not 0 < stride < length or len(tokens) <= length:
        raise ValueError(
            f"expected 0 < stride < length < number of tokens, "
            f"got {stride}, {length} and {len(tokens)}"
        )
    starts = list(range(0, len(tokens) - 1, stride))
    nats, pairs = 0.0, np.zeros(3)
    for first in range(0, len(starts), batch):
        windows, real, scored = _windows(
            tokens, starts[first : first + batch], length, stride, batch
        )
        loss, counts = _run(model, *(tag(array, "b", "s") for array in (windows, real, scored)))
        nats += float(loss)
        pairs += np.asarray(counts)
    assigned, rerouted, dropped = pairs
    # a re-routed pair is also one that its first choice dropped
    chosen = assigned - rerouted + dropped
    bits = nats / math.log(2) / num_bytes
    return Evaluation(bits, rerouted / chosen, (dropped - rerouted) / chosen)


@jax.jit
def _run(
    model: GptOss, windows: Tagged, real: Tagged, scored: Tagged
) -> tuple[jax.Array, jax.Array]:
    """-log p summed over scored tokens, and pairs assigned, re-routed and dropped [3]."""
    ids = windows.untag("b", "s")
    mask = tag(real.untag("b", "s")[:, :-1], "b", "s")
    logits, statistics = model.with_statistics(tag(ids[:, :-1], "b", "s"), token_mask=mask)
    array = logits.untag("b", "s", "voc")
    picked = jnp.take_along_axis(array, ids[:, 1:, None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(array, axis=-1) - picked
    reports = [layer.report for layer in statistics]
    counts = jnp.stack([jnp.stack([r.assigned, r.rerouted, r.dropped]) for r in reports]).sum(0)
    return jnp.where(scored.untag("b", "s")[:, 1:], losses, 0.0).sum(), counts


def _windows(
    tokens: np.ndarray, starts: list[int], length: int, stride: int, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows int32 [batch, length]; which tokens are real, and which to score, bool likewise."""
    windows = np.zeros((batch, length), np.int32)
    real, scored = np.zeros((2, batch, length), bool)
    for row, start in enumerate(starts):
        piece = tokens[start : start + length]
        windows[row, : len(piece)] = piece
        real[row, : len(piece)] = True
        scored[row, (length - stride if start else 1) : len(piece)] = True
    return windows, real, scored

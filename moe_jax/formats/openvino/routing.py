"""Routing weights and indices in the shapes of OpenVINO's internal operation `MOE`.

The operation multiplies what each expert returns with `routing_weights` and sums over the experts,
or over the chosen ones. Revisions differ in what they take; the indices are [..., topk] in all.

    scattered  [experts, ..., 1]   a weight for each expert and token, 0 for those not chosen. The
                                   page of the operation gives [experts, batch, topk, 1] as an
                                   example; in its formula the third axis is that of the tokens
    compact    [topk, tokens, 1]   a weight for each choice and token
    pairs      [..., topk]         the same shape as the indices
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from moe_jax.formats.errors import FormatError

type RoutingForm = Literal["scattered", "compact", "pairs"]

_FORMS = ("scattered", "compact", "pairs")


def from_openvino_routing(
    routing_weights: Any,
    indices: Any,
    num_experts: int,
    *,
    form: RoutingForm,
    token_shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [*token_shape, topk] for `moe_jax.fused_experts`.

    Args:
        routing_weights: float, of the shape of `form`.
        indices: int [*token_shape, topk] or [tokens, topk].
        num_experts: how many experts there are.
        form: how the weights lie; shapes alone cannot tell.
        token_shape: the sizes of the token axes.

    Raises:
        FormatError: shapes do not fit, or an index is none of the experts'.
        TypeError: indices are not integers, or weights not floats.
    """
    _check_form(form)
    weights, ids = np.asarray(routing_weights), np.asarray(indices)
    _check_dtypes(ids, weights)
    tokens = int(np.prod(token_shape, dtype=np.int64))
    topk = ids.shape[-1] if ids.ndim else 0
    if ids.shape not in ((*token_shape, topk), (tokens, topk)):
        raise FormatError(
            f"router_topk_output_indices must be {[*token_shape, 'topk']} or {[tokens, 'topk']}, "
            f"got {list(ids.shape)}"
        )
    expected = {
        "scattered": [(num_experts, *token_shape, 1), (num_experts, tokens, 1)],
        "compact": [(topk, tokens, 1)],
        "pairs": [ids.shape],
    }[form]
    if weights.shape not in expected:
        raise FormatError(
            f"routing_weights of the form {form!r} must be {list(expected[0])} to fit the indices "
            f"{list(ids.shape)}, got {list(weights.shape)}"
        )
    _check_range(ids, num_experts)
    ids = ids.reshape(tokens, topk)
    if form == "scattered":
        weights = _pick(weights.reshape(num_experts, tokens).T, ids)
    elif form == "compact":
        weights = weights[:, :, 0].T
    shape = (*token_shape, topk)
    return ids.reshape(shape), weights.reshape(shape)


def to_openvino_routing(
    ids: Any, weights: Any, num_experts: int, *, form: RoutingForm
) -> tuple[np.ndarray, np.ndarray]:
    """`routing_weights` of this form and indices [..., topk], from ids and weights [..., topk].

    Weights of an expert that a token names twice are added up where they are scattered.

    Raises:
        FormatError: shapes differ, or an id is none of the experts' (which here stands for no
            expert, and there for nothing).
        TypeError: ids are not integers, or weights not floats.
    """
    _check_form(form)
    ids, weights = np.asarray(ids), np.asarray(weights)
    _check_dtypes(ids, weights)
    if ids.shape != weights.shape or ids.ndim < 2:
        raise FormatError(
            f"ids and weights must both be [..., topk], got {list(ids.shape)} and "
            f"{list(weights.shape)}"
        )
    _check_range(ids, num_experts)
    if form == "pairs":
        return weights, ids
    *lead, topk = ids.shape
    rows, flat = weights.reshape(-1, topk), ids.reshape(-1, topk)
    if form == "compact":
        return rows.T[:, :, None], flat
    scattered = np.zeros((len(rows), num_experts), weights.dtype)
    np.add.at(scattered, (np.arange(len(rows))[:, None], flat), rows)
    return scattered.T.reshape(num_experts, *lead, 1), ids


def _pick(by_expert: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Weights [tokens, experts] as those [tokens, topk] of the chosen experts."""
    rest = by_expert.copy()
    np.put_along_axis(rest, ids, 0, axis=-1)
    if rest.any():
        token, expert = (int(i) for i in np.argwhere(rest)[0])
        raise FormatError(
            f"routing_weights give token {token} a weight for expert {expert}, which is not among "
            f"its router_topk_output_indices {ids[token].tolist()}"
        )
    # an expert that is named twice has one weight there, the sum
    repeated = np.tril(ids[:, :, None] == ids[:, None, :], k=-1).any(-1)
    picked = np.take_along_axis(by_expert, ids, axis=-1)
    return np.where(repeated, np.zeros_like(picked), picked)


def _check_form(form: str) -> None:
    if form not in _FORMS:
        raise FormatError(f"the form of routing weights must be one of {_FORMS}, got {form!r}")


def _check_dtypes(ids: np.ndarray, weights: np.ndarray) -> None:
    if ids.dtype not in (np.int32, np.int64):
        raise TypeError(f"router_topk_output_indices must be int32 or int64, got {ids.dtype}")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"routing_weights must be floats, got {weights.dtype}")


def _check_range(ids: np.ndarray, num_experts: int) -> None:
    wrong = (ids < 0) | (ids >= num_experts)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise FormatError(
            f"index {ids[place]} at {list(place)} is none of the {num_experts} experts: OpenVINO "
            f"does not check indices. Give an expert with weight 0 where no expert is meant"
        )

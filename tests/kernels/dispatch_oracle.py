"""Routing, sorting and combining in plain NumPy loops."""

import numpy as np


def route(
    logits: np.ndarray, experts_per_token: int, token_mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [T, k] and float64 weights [T, k]; ids of a token with a NaN are not defined."""
    num_tokens, num_experts = logits.shape
    ids = np.full((num_tokens, experts_per_token), num_experts, np.int32)
    weights = np.zeros((num_tokens, experts_per_token))
    for t in range(num_tokens):
        row = logits[t].astype(np.float64)
        if token_mask is not None and not token_mask[t]:
            continue
        if np.isnan(row).any():
            weights[t] = np.nan
            continue
        best = sorted(range(num_experts), key=lambda e: (-row[e], e))[:experts_per_token]
        best = [e for e in best if row[e] > -np.inf]
        if not best:
            continue
        ids[t, : len(best)] = best
        with np.errstate(invalid="ignore"):
            gates = np.exp(row[best] - row[best].max())
            weights[t, : len(best)] = gates / gates.sum()
        if np.isnan(weights[t]).any():
            weights[t, : len(best)] = np.nan
    return ids, weights


def sort_pairs(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """order int32 [P] and group_sizes int32 [E]."""
    flat = ids.reshape(-1)
    none = (flat < 0) | (flat >= num_experts)
    order = np.argsort(np.where(none, num_experts, flat), kind="stable")
    return order.astype(np.int32), np.bincount(flat[~none], minlength=num_experts).astype(np.int32)


def combine(y: np.ndarray, ids: np.ndarray, num_experts: int) -> np.ndarray:
    """float64 [T, D]."""
    valid = (ids >= 0) & (ids < num_experts)
    rows = y.astype(np.float64).reshape(*ids.shape, y.shape[1])
    return np.where(valid[:, :, None], rows, 0.0).sum(1)

"""What routing and sorting return."""

from typing import NamedTuple

import jax


class SortedPairs(NamedTuple):
    """Pairs by expert. Pair p is the (p % experts_per_token)-th of token p // experts_per_token.

    Attributes:
        order: int32 [P], pairs sorted by expert, earlier pairs first; those of no expert are last.
        group_sizes: int32 [E], pairs of each expert.
    """

    order: jax.Array
    group_sizes: jax.Array


class RoutedPairs(NamedTuple):
    """Routing, and its pairs by expert.

    Attributes:
        ids: int32 [T, experts_per_token], best first; the number of experts where there is none.
        pair_weight: float32 [P], 0 where there is no expert.
        order: see `SortedPairs`.
        group_sizes: see `SortedPairs`.
    """

    ids: jax.Array
    pair_weight: jax.Array
    order: jax.Array
    group_sizes: jax.Array

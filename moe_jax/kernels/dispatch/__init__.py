"""Pairs of a token and an expert: routing, sorting by expert, and combining what comes back."""

from moe_jax.kernels.dispatch.api import RoutedPairs as RoutedPairs
from moe_jax.kernels.dispatch.api import SortedPairs as SortedPairs
from moe_jax.kernels.dispatch.api import combine_pairs as combine_pairs
from moe_jax.kernels.dispatch.api import route_pairs as route_pairs
from moe_jax.kernels.dispatch.api import sort_pairs as sort_pairs

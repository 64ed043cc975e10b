"""Attention with sinks and sliding windows, by position: see `api`."""

from moe_jax.kernels.attention.api import attend as attend
from moe_jax.kernels.attention.reference import EMPTY as EMPTY
from moe_jax.kernels.attention.reference import visible as visible

"""Rows times the expert that each was routed to."""

from moe_jax.kernels.grouped_matmul.api import grouped_matmul as grouped_matmul

"""Meshes of the tests, with the rules of gpt-oss."""

import sharding_tools

from gpt_oss.mesh import RULES
from moe_jax import Sharding


def sharding(sizes: tuple[int, int, int], **options) -> Sharding:
    return sharding_tools.sharding(sizes, rules=RULES, **options)

"""Where values lie inside a program that runs on a mesh; without one, nothing is said."""

import dataclasses
from typing import Any

from moe_jax.sharding import Sharding
from moe_jax.tagged import Tagged


def constrained(x: Tagged, sharding: Sharding | None) -> Tagged:
    """`x`, lying where the rules say, if there are any."""
    return x if sharding is None else sharding.constrain(x)


def on_every_device(x: Tagged, sharding: Sharding | None) -> Tagged:
    """`x`, whole on every device, so that the host of each can read it."""
    return x if sharding is None else Sharding(sharding.mesh, {}).constrain(x)


def constrained_cache(cache: Any, sharding: Sharding | None) -> Any:
    """A `FullCache` or `RingCache` lying where the rules say: with the heads that read it."""
    parts = {name: constrained(getattr(cache, name), sharding) for name in ("keys", "values")}
    return dataclasses.replace(cache, **parts)

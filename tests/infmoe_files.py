"""Files, attributes and layers of InfMoE for tests."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from core_oracle import f32

from moe_jax import MoE, Norm, T5FeedForward
from moe_jax.formats import infmoe
from moe_jax.formats.infmoe import DESCRIBED_NORM, InfMoEPlugin

GOLDENS = Path(__file__).parent / "formats" / "goldens_infmoe.npz"
EXPERTS, HIDDEN, WIDE = 5, 6, 9
T5_KEYS = ("layer_norm_weight", "wi_0_weight", "wi_1_weight", "wo_weight")


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDENS, allow_pickle=False) as file:
        return dict(file)


def weights(bias: bool = False, experts: int = EXPERTS) -> dict[str, np.ndarray]:
    keys = (*T5_KEYS, "layer_norm_bias") if bias else T5_KEYS
    return {f"{n}/{key}": goldens()[f"{n}/{key}"] for n in range(experts) for key in keys}


def save(folder: Path, arrays: dict[str, np.ndarray]) -> str:
    """As one without this library would write the file."""
    path = folder / "experts.npz"
    np.savez(path, **arrays)
    return str(path)


def plugin_of(path: str, **attributes) -> InfMoEPlugin:
    known = {
        "expert_count": EXPERTS,
        "embedding_size": HIDDEN,
        "hidden_size": WIDE,
        "expert_centroids": goldens()["centroids"],
        "expert_weight_file": path,
    }
    if attributes.get("moe_variant") == "cpm_2":
        known["layernorm_weight"] = goldens()["router_norm_weight"]
    return InfMoEPlugin(**{**known, **attributes})


def layer_of(rng, variant="default", norm=DESCRIBED_NORM, bias=False, sizes=(4, 3, 7), **experts):
    """A random layer with its experts, embedding size and hidden size."""
    count, size, hidden = sizes
    known = infmoe.VARIANTS[variant]

    def draw(*axes, **sizes):
        return f32(rng.normal(size=tuple(sizes.values())), *(axes or sizes))

    feed_forward = T5FeedForward(
        draw(expert=count, d=size),
        draw(expert=count, out=hidden, **{"in": size}),
        draw(expert=count, out=hidden, **{"in": size}),
        draw(expert=count, out=size, **{"in": hidden}),
        norm_bias=draw(expert=count, d=size) if bias else None,
        norm=norm,
    )
    return MoE(
        dataclasses.replace(feed_forward, **experts),
        draw(expert=count, d=size),
        experts_per_token=1,
        router=known.router,
        remaining_weight=known.remaining_weight,
        router_norm_weight=draw(d=size) if known.router_norm else None,
        router_norm=norm if known.router_norm else Norm(),
    )

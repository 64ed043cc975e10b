"""The library's layer of a plugin and its weight file, and back."""

import os
from collections.abc import Mapping
from typing import Any

from moe_jax.formats.arrays import numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.infmoe.plugin import (
    DTYPES,
    VARIANTS,
    InfMoEPlugin,
    Variant,
    check_norm,
    lookup,
)
from moe_jax.formats.infmoe.sublayers import SUBLAYERS, Sublayer
from moe_jax.formats.infmoe.weight_file import read_arrays, write_arrays
from moe_jax.formats.modules import check_sayable
from moe_jax.layer import MoE
from moe_jax.mixture_of_experts import AlgorithmChoice
from moe_jax.norms import Norm
from moe_jax.sharding.mesh import Sharding
from moe_jax.tagged import tag
from moe_jax.variables import Variables, value


def read_layer(
    plugin: InfMoEPlugin,
    *,
    norm: Norm,
    algorithm: AlgorithmChoice = "auto",
    sharding: Sharding | None = None,
    sublayers: Mapping[str, Sublayer] = SUBLAYERS,
) -> MoE:
    """The layer of a plugin and its weight file.

    Args:
        plugin: the attributes. The file is read at `plugin.expert_weight_file`; nothing in it is
            unpickled.
        norm: `DESCRIBED_NORM` or `KERNEL_NORM`; see the module.
        algorithm: see `moe_jax.mixture_of_experts`.
        sharding: see `moe_jax.mixture_of_experts`.
        sublayers: the known `expert_sublayer_type`s.

    Returns:
        A layer for x {..., d}.

    Raises:
        FormatError: the sub-layer is unknown, the eps is not InfMoE's, or the file is no npz file,
            lacks keys or has others (they are listed), or an array of it has another shape or type.
        FileNotFoundError: there is no such file.
    """
    check_norm("norm", norm)
    sublayer = lookup("expert_sublayer_type", plugin.expert_sublayer_type, sublayers)
    variant = VARIANTS[plugin.moe_variant]
    arrays = read_arrays(plugin, sublayer)
    scale = plugin.layernorm_weight
    return MoE(
        sublayer.make(arrays, norm),
        tag(plugin.expert_centroids, "expert", "d"),
        experts_per_token=1,
        router=variant.router,
        remaining_weight=variant.remaining_weight,
        router_norm_weight=None if scale is None else tag(scale, "d"),
        router_norm=norm if variant.router_norm else Norm(),
        algorithm=algorithm,
        sharding=sharding,
    )


def write_layer(
    layer: MoE,
    path: str | os.PathLike[str],
    *,
    max_concurrency: int = 2,
    sublayers: Mapping[str, Sublayer] = SUBLAYERS,
) -> InfMoEPlugin:
    """Writes a layer's experts to `path` and returns the plugin's attributes.

    Args:
        layer: one expert a token, chosen by centroids; see `VARIANTS` for its router.
        path: of the npz file, which is replaced. Nothing is written where the layer is refused.
        max_concurrency: see `InfMoEPlugin`.
        sublayers: the known `expert_sublayer_type`s.

    Raises:
        FormatError: the layer has what InfMoE cannot say; the attribute is named.
    """
    check_sayable(layer, "router", "remaining_weight", "router_norm_weight", "router_norm")
    name, experts = _sublayer_of(layer, sublayers)
    norm = sublayers[name].norm(experts)
    if norm is not None:
        check_norm("the norm of the experts", norm)
    variant = _variant_of(layer, norm)
    centroids = numpy_of(
        "router_weight", value(layer.router_weight), ("expert", "d"), dtypes=DTYPES
    )
    scale = None
    if layer.router_norm_weight is not None:
        tagged = value(layer.router_norm_weight)
        scale = numpy_of("router_norm_weight", tagged, ("d",), dtypes=DTYPES)
    plugin = InfMoEPlugin(
        expert_count=centroids.shape[0],
        embedding_size=centroids.shape[1],
        hidden_size=sublayers[name].hidden_size(experts),
        expert_centroids=centroids,
        expert_weight_file=os.fspath(path),
        expert_sublayer_type=name,
        moe_variant=variant,
        layernorm_weight=scale,
        max_concurrency=max_concurrency,
    )
    write_arrays(plugin, sublayers[name], sublayers[name].take(experts))
    return plugin


def _sublayer_of(layer: MoE, sublayers: Mapping[str, Sublayer]) -> tuple[str, Any]:
    """The `expert_sublayer_type` of a layer's experts, and the experts."""
    experts = layer.experts.tree() if isinstance(layer.experts, Variables) else layer.experts
    for name, sublayer in sublayers.items():
        if type(experts) is sublayer.kind:
            return name, experts
    known = ", ".join(sublayer.kind.__name__ for sublayer in sublayers.values())
    raise FormatError(
        f"InfMoE has no expert_sublayer_type for experts of the class {type(experts).__name__}, "
        f"only for {known}: add a Sublayer for it"
    )


def _variant_of(layer: MoE, norm: Norm | None) -> str:
    """The `moe_variant` of a layer whose experts have `norm`."""
    config = layer.config
    if config.experts_per_token != 1:
        raise FormatError(f"InfMoE has experts_per_token=1, got {config.experts_per_token}")
    router_norm = layer.router_norm_weight is not None
    if router_norm:
        check_norm("router_norm", config.router_norm)
        if norm is not None and norm != config.router_norm:
            raise FormatError(
                f"InfMoE has one norm throughout: router_norm is {config.router_norm}, "
                f"that of the experts {norm}"
            )
    wanted = Variant(config.router, config.remaining_weight, router_norm)
    for name, variant in VARIANTS.items():
        if variant == wanted:
            return name
    known = "; ".join(f"{name}: {variant}" for name, variant in VARIANTS.items())
    raise FormatError(
        f"InfMoE has no moe_variant with router={config.router}, remaining_weight="
        f"{config.remaining_weight!r} and {'a' if router_norm else 'no'} router_norm_weight, "
        f"only {known}"
    )

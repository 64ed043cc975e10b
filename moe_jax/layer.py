"""The mixture-of-experts layer as a Flax module, with its router."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.call import like_tokens, token_axes
from moe_jax.dispatch import DispatchReport, Overflow, check_dispatch
from moe_jax.experts.base import check_experts
from moe_jax.losses import load_balance_loss, router_z_loss
from moe_jax.mixture_of_experts import (
    AlgorithmChoice,
    RemainingWeight,
    check_remaining_weight,
    mixture_of_experts,
)
from moe_jax.norms import Norm
from moe_jax.routing import (
    Router,
    check_expert_axis,
    check_experts_per_token,
    check_groups,
    route,
    router_logits,
)
from moe_jax.sharding.expert_parallel import before_routing
from moe_jax.sharding.mesh import Sharding
from moe_jax.tagged import Tagged, is_tagged
from moe_jax.variables import Variables, fixed, param, value


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """How an `MoE` layer routes and dispatches.

    Attributes:
        experts_per_token: how many experts a token is sent to.
        router: how logits become weights.
        algorithm: see `mixture_of_experts`.
        tokens_per_expert_ratio: see `mixture_of_experts`.
        overflow: see `mixture_of_experts`.
        sharding: see `mixture_of_experts`.
        remaining_weight: see `mixture_of_experts`.
        router_norm: how x is normalized for the router, in a layer with a `router_norm_weight`.
    """

    experts_per_token: int
    router: Router = Router()
    algorithm: AlgorithmChoice = "auto"
    tokens_per_expert_ratio: float | None = None
    overflow: Overflow = "reroute"
    sharding: Sharding | None = None
    remaining_weight: RemainingWeight = "unused"
    router_norm: Norm = Norm()

    def __post_init__(self) -> None:
        if not isinstance(self.router, Router):
            raise TypeError(f"router must be a Router, got {self.router!r}")
        if not isinstance(self.router_norm, Norm):
            raise TypeError(f"router_norm must be a moe_jax.Norm, got {self.router_norm!r}")
        check_remaining_weight(self.remaining_weight)
        check_dispatch(self.algorithm, self.tokens_per_expert_ratio, self.overflow)
        if not isinstance(self.sharding, Sharding | None):
            raise TypeError(f"sharding must be a moe_jax.Sharding, got {self.sharding!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
    """What training and monitoring want to know of one pass; float32 scalars and a report.

    Attributes:
        load_balance: `load_balance_loss` of the pass.
        z: `router_z_loss` of the pass.
        report: what was assigned, re-routed and dropped.
    """

    load_balance: jax.Array
    z: jax.Array
    report: DispatchReport


class MoE(nnx.Module):
    """A mixture-of-experts layer with its router.

    Attributes:
        router_weight: Param of {expert, d}; without a bias its rows are centroids.
        router_bias: Param of {expert}, or None.
        router_norm_weight: Param of {d}, or None. With it the router, and the router alone, sees
            the norm of x that `config.router_norm` says.
        selection_bias: `Fixed` of {expert}, or None; see `mixture_of_experts`. It has no gradient.
        experts: `Variables` of the experts: Params for floats, `Fixed` for packed weights. The
            module itself where they are an `nnx.Module`.
        config: `MoEConfig`.
    """

    def __init__(
        self,
        experts: Any,
        router_weight: Tagged,
        router_bias: Tagged | None = None,
        *,
        experts_per_token: int,
        router: Router = Router(),  # noqa: B008 - frozen
        algorithm: AlgorithmChoice = "auto",
        tokens_per_expert_ratio: float | None = None,
        overflow: Overflow = "reroute",
        selection_bias: Tagged | None = None,
        sharding: Sharding | None = None,
        remaining_weight: RemainingWeight = "unused",
        router_norm_weight: Tagged | None = None,
        router_norm: Norm = Norm(),  # noqa: B008 - frozen
    ) -> None:
        if set(router_weight.axes) != {"expert", "d"}:
            raise ValueError(f"router_weight must have the axes {{expert, d}}, got {router_weight}")
        num_experts = router_weight.size("expert")
        check_experts_per_token(experts_per_token, num_experts)
        check_experts(experts, num_experts)
        self.config = MoEConfig(
            experts_per_token,
            router,
            algorithm,
            tokens_per_expert_ratio,
            overflow,
            sharding,
            remaining_weight,
            router_norm,
        )
        check_groups(router, experts_per_token, num_experts)
        for name, bias in (("router_bias", router_bias), ("selection_bias", selection_bias)):
            if bias is not None:
                check_expert_axis(name, bias, num_experts)
        if router_norm_weight is not None:
            _check_norm_weight(router_norm_weight, router_weight.size("d"))
        self.router_weight = param(router_weight)
        self.router_bias = None if router_bias is None else param(router_bias)
        self.router_norm_weight = None if router_norm_weight is None else param(router_norm_weight)
        self.selection_bias = None if selection_bias is None else fixed(selection_bias)
        self.experts = experts if isinstance(experts, nnx.Module) else Variables(experts)

    def logits(self, x: Tagged) -> Tagged:
        """The router's logits {..., expert}, float32, of x {..., d}."""
        bias = None if self.router_bias is None else value(self.router_bias)
        if self.router_norm_weight is not None:
            x = self.config.router_norm(x.astype(jnp.float32), value(self.router_norm_weight))
        return router_logits(x, value(self.router_weight), bias)

    def __call__(self, x: Any, *, token_mask: Any = None) -> Any:
        """x {..., d} -> {..., d}, `Tagged` or bare; token_mask as in `mixture_of_experts`."""
        return self._apply(x, token_mask)[0]

    def with_statistics(self, x: Any, *, token_mask: Any = None) -> tuple[Any, RouterStatistics]:
        """The same, and the losses and counts of this pass."""
        y, logits, report = self._apply(x, token_mask)
        mask = None if token_mask is None else like_tokens(token_mask, logits, "expert")
        routing = route(
            logits,
            self.config.experts_per_token,
            self.config.router,
            selection_bias=self._selection_bias(),
        )
        losses = load_balance_loss(logits, routing, mask), router_z_loss(logits, mask)
        return y, RouterStatistics(*losses, report)

    def _apply(self, x: Any, token_mask: Any) -> tuple[Any, Tagged, DispatchReport]:
        if not is_tagged(x):
            x = jnp.asarray(x)
        named = x if is_tagged(x) else Tagged(x, (*token_axes(x.ndim - 1), "d"))
        config = self.config
        if config.sharding is not None:
            named = before_routing(named, config.experts_per_token, config.sharding)
            x = named if is_tagged(x) else named.array
        if token_mask is not None:
            # what padding holds, even NaN, must not reach the router's gradient
            keep = like_tokens(token_mask, named, "d").expand_to(named)
            named = named.map(lambda array: jnp.where(keep, array, 0))
        logits = self.logits(named)
        y, report = mixture_of_experts(
            self._experts(),
            x,
            logits if is_tagged(x) else logits.array,
            experts_per_token=config.experts_per_token,
            normalization=config.router,
            tokens_per_expert_ratio=config.tokens_per_expert_ratio,
            algorithm=config.algorithm,
            token_mask=token_mask,
            selection_bias=self._selection_bias(),
            overflow=config.overflow,
            with_report=True,
            sharding=config.sharding,
            remaining_weight=config.remaining_weight,
        )
        return y, logits, report

    def _experts(self) -> Any:
        return self.experts.tree() if isinstance(self.experts, Variables) else self.experts

    def _selection_bias(self) -> Tagged | None:
        return None if self.selection_bias is None else value(self.selection_bias)


def _check_norm_weight(weight: Tagged, size: int) -> None:
    if weight.sizes != {"d": size}:
        raise ValueError(f"router_norm_weight must be {{d={size}}}, got {weight}")

"""What travels between devices, and in which dtype."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import combine, f32
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from sharding_cases import COMMUNICATIONS, EXPERTS, HIDDEN, BareAffine, cases, experts
from sharding_tools import sharding

import moe_jax
from moe_jax import tag


def collectives(compiled: str) -> dict[str, int]:
    """How many collectives of each kind a compiled program has."""
    return {
        name: count
        for name in ("all-reduce", "all-to-all", "all-gather", "collective-permute")
        if (count := compiled.count(f" {name}(") + compiled.count(f" {name}-start("))
    }


@pytest.mark.parametrize(
    "communication, expected",
    [("psum", {"all-reduce": 1}), ("all_to_all", {"all-to-all": 6, "all-reduce": 1})],
)
def test_only_rows_travel(communication, expected):
    """No collective moves weights; the all-reduce of the exchange agrees on further rounds.

    A round has three: rows, and ids with weights, go out, and rows come back. The first round and
    the loop of further ones are there once each.
    """
    here = sharding((1, 8, 1), communication=communication)
    case, pairs, whole = cases()["even"], ("s", "top_expert"), 296
    args = (
        here.place(experts().ours()),
        f32(case.x[:whole], "s", "d"),
        tag(jnp.asarray(case.ids[:whole], jnp.int32), *pairs),
        f32(case.weights[:whole], *pairs),
    )
    function = jax.jit(
        lambda e, x, ids, w: moe_jax.fused_experts(x, ids, w, e, sharding=here),
        out_shardings=jax.NamedSharding(here.mesh, jax.P()) if communication == "psum" else None,
    )
    text = function.lower(*args).compile().as_text()
    assert collectives(text) == expected


BARE, TAGGED = None, ("b", "s", "d")


@pytest.mark.parametrize("axes", [BARE, TAGGED], ids=["bare", "tagged"])
@pytest.mark.parametrize("shape", [(8, 3), (24,), (1, 24)], ids=str)
@pytest.mark.parametrize("sizes", [(4, 1, 1), (4, 2, 1), (2, 2, 2)], ids=str)
def test_tokens_stay_split_over_data(rng, sizes, shape, axes):
    """`MoE` leaves each part of the batch where it is, whatever the token axes are called."""
    if axes is not None and len(shape) == 1:
        axes = axes[1:]
    here = sharding(sizes, communication="psum")
    layer = moe_jax.MoE(
        here.place(experts().ours()),
        f32(rng.normal(size=(EXPERTS, HIDDEN)), "expert", "d"),
        experts_per_token=3,
        sharding=here,
    )
    x = jnp.asarray(rng.normal(size=(*shape, HIDDEN)), jnp.float32)
    spec = PartitionSpec(None, "data") if shape[0] == 1 else PartitionSpec("data")
    where = NamedSharding(here.mesh, spec)
    x = jax.device_put(x if axes is None else tag(x, *axes), where)
    graph, state = nnx.split(layer)

    @jax.jit
    def call(state, x):
        return nnx.merge(graph, state)(x)

    text = call.lower(state, x).compile().as_text()
    moved = re.findall(
        r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|collective-perm\w+)\(", text
    )
    # the logits of top_k, which XLA does not split, may be gathered; rows may not
    assert not [shape for shape in moved if shape.split(",")[-1] != str(EXPERTS)], moved


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_sums_over_devices_are_rounded_once(rng, communication):
    """Each device adds what bfloat16 holds exactly, so that only the sum is rounded."""
    tokens = 48
    x = rng.integers(-7, 8, (tokens, HIDDEN)).astype(np.float64)
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)
    weights = 2.0 ** rng.integers(-5, 6, (tokens, EXPERTS))
    scale = 1 - 2.0 * rng.integers(0, 2, (EXPERTS, HIDDEN))
    here = sharding((1, 8, 1), communication=communication)
    ours = BareAffine(jnp.asarray(scale, jnp.bfloat16), jnp.zeros_like(scale, jnp.bfloat16))
    function = jax.jit(
        lambda e: moe_jax.fused_experts(
            jnp.asarray(x, jnp.bfloat16), ids, weights.astype(np.float32), e, sharding=here
        )
    )
    placed = here.place(ours)
    if communication == "psum":  # a CPU sums bfloat16 in float32 anyway, GPUs do not
        program = function.lower(placed).as_text()
        summed = re.findall(
            r"stablehlo\.all_reduce.*?\^bb0\(%\w+: tensor<(\w+)>", program, re.DOTALL
        )
        assert summed == ["f32"]
    y = function(placed)
    assert y.dtype == jnp.bfloat16
    expected = combine(x, ids, weights, lambda e, row: row * scale[e])
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 2.0**-9

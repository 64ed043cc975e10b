"""Random layers as state dicts: computed from the tensors as PyTorch's modules do, or refused."""

import dataclasses

import jax.numpy as jnp
import layer_oracle
import numpy as np
import pytest
from core_oracle import clamped_swiglu, combine, gelu, route, sigmoid
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import Activation, Router, tag
from moe_jax.formats import FormatError
from moe_jax.formats.torch import (
    DROPLESS,
    GPT_OSS,
    MIXTRAL,
    MIXTRAL_CHECKPOINT,
    export_state,
    import_state,
)
from moe_jax.layer import MoE
from moe_jax.variables import value

NORMALIZED = Router(order="before_top_k", renormalize=True)
KINDS = {
    "dropless": (DROPLESS, layer_oracle.mlp, Activation("gelu"), True, NORMALIZED),
    "gpt_oss": (
        GPT_OSS,
        layer_oracle.gpt_oss,
        Activation("swiglu", 1.702, 1.0, 7.0, "interleaved"),
        True,
        Router(),
    ),
    "mixtral": (MIXTRAL, layer_oracle.gated, Activation("swiglu"), False, NORMALIZED),
    "checkpoint": (MIXTRAL_CHECKPOINT, layer_oracle.gated, Activation("swiglu"), False, NORMALIZED),
}
REFUSED = {
    "router": {"router": Router(score="sigmoid")},
    "remaining_weight": {"remaining_weight": "input"},
    "tokens_per_expert_ratio": {"tokens_per_expert_ratio": 2.0},
    "selection_bias": {"selection_bias": tag(jnp.zeros(5), "expert")},
}


def modules(kind: str, state: dict[str, np.ndarray], x: np.ndarray, k: int) -> np.ndarray:
    """What the module of a state dict makes of rows x [T, D], in float64."""
    t = {name: array.astype(np.float64) for name, array in state.items()}
    if kind == "gpt_oss":
        ids, weights = route(x @ t["router.weight"].T + t["router.bias"], k, Router())

        def expert(e: int, row: np.ndarray) -> np.ndarray:
            lanes = row @ t["experts.gate_up_proj"][e] + t["experts.gate_up_proj_bias"][e]
            hidden = clamped_swiglu(lanes[0::2], lanes[1::2], 1.702, 1.0, 7.0)
            return hidden @ t["experts.down_proj"][e] + t["experts.down_proj_bias"][e]

        return combine(x, ids, weights, expert)
    name = "router.weight" if kind == "dropless" else "gate.weight"
    ids, weights = route(x @ t[name].T, k, NORMALIZED)

    def gated(gate: np.ndarray, up: np.ndarray, down: np.ndarray, row: np.ndarray) -> np.ndarray:
        lane = gate @ row
        return down @ (lane * sigmoid(lane) * (up @ row))

    def expert(e: int, row: np.ndarray) -> np.ndarray:
        if kind == "dropless":
            return gelu(row @ t["w1"][e] + t["b1"][e]) @ t["w2"][e] + t["b2"][e]
        if kind == "mixtral":
            gate, up = np.split(t["experts.gate_up_proj"][e], 2)
            return gated(gate, up, t["experts.down_proj"][e], row)
        return gated(*(t[f"experts.{e}.w{n}.weight"] for n in (1, 3, 2)), row)

    return combine(x, ids, weights, expert)


def leaves(layer: MoE) -> dict[str, np.ndarray]:
    """Every array of a layer by name."""
    arrays = {
        f: value(getattr(layer, f)) for f in ("router_weight", "router_bias") if getattr(layer, f)
    }
    arrays |= {f: v for f, v in vars(layer.experts.tree()).items() if f != "activation"}
    return {name: np.asarray(v.array) for name, v in arrays.items() if v is not None}


def test_random_layers_are_computed_from_their_tensors_or_refused(record_property):
    errors, refused = [], set()

    @settings(max_examples=500, derandomize=True, deadline=None, database=None)
    @given(
        seed=st.integers(0, 2**32),
        kind=st.sampled_from(list(KINDS)),
        sizes=st.sampled_from([(4, 7, 1), (6, 3, 2), (4, 4, 5)]),
        dtype=st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]),
        wrong=st.sampled_from(["", "", "", "activation", *REFUSED]),
    )
    def check(seed, kind, sizes, dtype, wrong):
        rng, (hidden, inner, k) = np.random.default_rng(seed), sizes
        layout, make, activation, biases, router = KINDS[kind]
        if wrong == "activation":
            activation = dataclasses.replace(
                activation, kind="geglu" if activation.gated else "relu", alpha=1.0
            )
        options = {"router": router} | REFUSED.get(wrong, {})
        if kind == "gpt_oss":
            options["router_bias"] = tag(layer_oracle.random_array(rng, jnp.float32, 5), "expert")
        experts = make(rng, 5, hidden, inner, activation, dtype, biases)
        layer = layer_oracle.moe(rng, experts, 5, hidden, k, **options)
        if wrong:
            with pytest.raises(FormatError, match=wrong):
                export_state(layer, layout)
            refused.add(wrong)
            return
        state, x = export_state(layer, layout), rng.normal(size=(3, hidden))
        expected = layer_oracle.evaluate(layer, x)
        error = np.abs(modules(kind, state, x, k) - expected).max() / np.abs(expected).max()
        assert error < 1e-12
        errors.append(error)
        back = leaves(import_state(state, layout, experts_per_token=k))
        for name, array in leaves(layer).items():
            assert back[name].dtype == array.dtype
            np.testing.assert_array_equal(back[name], array)

    check()
    assert len(errors) > 100 and refused == {"activation", *REFUSED}
    record_property("bad_input", "export of what the target cannot say")

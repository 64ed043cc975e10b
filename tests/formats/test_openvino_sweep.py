"""Five hundred random layers: OpenVINO computes them, or the export names what it cannot say.

To compile a graph takes some 40 ms alone and 15 ms among others: layers are compiled by twenties.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import Activation, MoE, Router
from moe_jax.formats import FormatError

pytest.importorskip("openvino_tools")

import core_oracle
from openvino_tools import (
    LIMIT_OF_ERROR,
    assert_same_layer,
    compiled,
    distinct_ids,
    experts_oracle,
    gated,
    gpt_oss,
    layer_oracle,
    operations,
    outputs,
    tokens,
    with_router,
)

from moe_jax.formats.openvino.model import from_model, to_model

TOGETHER, BATCHES = 20, 25
# experts, hidden, intermediate, experts a token
SIZES = [(7, 5, 6, 2), (4, 6, 3, 1), (5, 3, 8, 5), (3, 7, 7, 2)]
MATRICES = {gpt_oss: 2, gated: 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to be drawn; `seed` for its numbers."""

    build: object
    sizes: tuple
    activation: Activation
    dtype: object
    router: Router | None
    bias: bool
    selection: bool
    seed: int

    def layer(self):
        rng = np.random.default_rng(self.seed)
        experts = self.build(rng, self.activation, self.dtype, self.sizes[:3])
        if self.router is None:
            return experts
        return with_router(rng, experts, self.router, self.sizes[3], self.bias, self.selection)

    def unsayable(self):
        """Fields of which the refusal names at least one; empty where the layer can be written."""
        a, fields = self.activation, []
        if self.build is gpt_oss:
            fields += ["activation.kind"] * (a.kind != "swiglu")
            fields += ["activation.beta"] * (a.beta != 1.0)
            fields += ["activation.limit"] * (a.limit is None)
        else:
            fields += ["activation.kind"] * (a.kind == "reglu")
            fields += ["activation.beta"] * (a.beta != 0.0 or a.limit is not None)
            fields += ["activation.alpha"] * (a.alpha != 1.0)
        if self.router is not None:
            fields += ["router.score"] * (self.router.score == "linear")
            fields += ["router.num_groups"] * (self.router.num_groups > 1)
        return fields


def mostly(common, *rare):
    """The first nine times in ten, or one of the others."""
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(rare) if n == 9 else st.just(common))


@st.composite
def activations(draw, build):
    if build is gpt_oss:
        kind, beta = draw(mostly("swiglu", "geglu", "reglu")), draw(mostly(1.0, 0.0, 0.5))
        limit = draw(st.sampled_from([7.0, 0.9, 2.3] * 3 + [None]))
        alpha = draw(st.sampled_from([1.0, 1.702, 0.1]))
        layouts = ["interleaved", "interleaved_up_first", "concatenated", "concatenated_up_first"]
        layout = draw(st.sampled_from(layouts))
    else:
        kind = draw(st.sampled_from(["swiglu", "geglu", "geglu_tanh"] * 3 + ["reglu"]))
        beta, limit = draw(mostly(0.0, 1.0)), draw(mostly(None, 7.0))
        alpha, layout = draw(mostly(1.0, 1.702)), "concatenated"
    return Activation(kind, alpha if kind == "swiglu" else 1.0, beta, limit, layout)


@st.composite
def routers(draw, num_experts, topk):
    if draw(st.integers(0, 4)) == 0:
        return None
    groups = draw(mostly(1, num_experts))
    return Router(
        score=draw(st.sampled_from(["softmax", "sigmoid"] * 5 + ["linear"])),
        order=draw(st.sampled_from(["after_top_k", "before_top_k"])),
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5, 0.1])),
        num_groups=groups,
        groups_per_token=1 if groups == 1 else topk,
    )


@st.composite
def cases(draw):
    build, sizes = draw(st.sampled_from([gpt_oss, gated])), draw(st.sampled_from(SIZES))
    return Case(
        build,
        sizes,
        draw(activations(build)),
        draw(st.sampled_from([np.float32, np.float16, jnp.bfloat16])),
        draw(routers(sizes[0], sizes[3])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
    )


def inputs_of(name, case):
    rng = np.random.default_rng(case.seed + 1)
    num_experts, hidden, _, topk = case.sizes
    inputs = {f"{name}.hidden_states": tokens(rng, 1, 3, hidden)}
    if case.router is None:
        inputs[f"{name}.selected_experts"] = distinct_ids(rng, (1, 3), num_experts, topk)
        inputs[f"{name}.scores"] = rng.normal(size=(1, 3, topk)).astype(np.float32)
    return inputs


def oracle(name, layer, inputs):
    """What a layer makes of its inputs, and which tokens count."""
    x = inputs[f"{name}.hidden_states"]
    if isinstance(layer, MoE):
        return layer_oracle(layer, x)
    ids, scores = inputs[f"{name}.selected_experts"][0], inputs[f"{name}.scores"][0]
    y = core_oracle.combine(x[0], ids, scores.astype(np.float64), experts_oracle(layer))
    return y[None], np.ones(x.shape[:-1], bool)


@settings(max_examples=BATCHES, derandomize=True, deadline=None, database=None)
@given(st.lists(cases(), min_size=TOGETHER, max_size=TOGETHER))
def test_random_layers_are_computed_or_refused(batch):
    layers, kept, inputs, matrices = {}, set(), {}, 0
    for number, case in enumerate(batch):
        name, layer, fields = f"layer{number}", case.layer(), case.unsayable()
        if fields:
            with pytest.raises(FormatError) as refusal:
                to_model({name: layer})
            assert any(f"{field}=" in str(refusal.value) for field in fields)
            continue
        layers[name] = layer
        if case.build is gated or case.activation.layout.startswith("interleaved"):
            kept.add(name)
        inputs |= inputs_of(name, case)
        matrices += MATRICES[case.build]
    if not layers:
        return
    model = to_model(layers)
    for name, layer in from_model(model).items():
        if name in kept:
            assert_same_layer(layer, layers[name])
    program = compiled(model)
    assert operations(program)["GatherMatmul"] == matrices
    results = outputs(program, inputs)
    for name, layer in layers.items():
        expected, clear = oracle(name, layer, inputs)
        size = max(1.0, np.abs(expected).max())
        error = np.abs(results[f"{name}.output"] - expected)[clear].max(initial=0.0)
        assert error <= LIMIT_OF_ERROR * size

"""Layers to write as OpenVINO graphs, what they compute in NumPy float64, and compiled graphs."""

import collections
import dataclasses

import core_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import Activation, GatedMLP, GptOssMLP, MoE, Router, tag
from moe_jax.formats.openvino.package import load_openvino

try:
    ov = load_openvino()
except ImportError:
    pytest.skip("openvino is not installed", allow_module_level=True)

from moe_jax.formats.openvino.model import CPU_FLOAT32

VERSION = f"openvino {ov.__version__.split('-')[0]}"
LIMIT_OF_ERROR = 1.5e-5
E, D, F, K = 7, 5, 6, 2
WEIGHT, BIAS = ("expert", "out", "in"), ("expert", "out")
CORE = ov.Core()
SILU, AFTER = Activation("swiglu"), Router()


def draw(rng, shape, axes, dtype=jnp.float32, scale=1.0):
    """Normal numbers that the dtype holds, tagged."""
    return tag(jnp.asarray((rng.normal(size=shape) * scale).astype(dtype)), *axes)


def gpt_oss(rng, activation=moe_jax.GPT_OSS_ACTIVATION, dtype=jnp.float32, sizes=(E, D, F)):
    e, d, i = sizes
    return GptOssMLP(
        draw(rng, (e, 2 * i, d), WEIGHT, dtype, d**-0.5),
        draw(rng, (e, 2 * i), BIAS, dtype),
        draw(rng, (e, d, i), WEIGHT, dtype, i**-0.5),
        draw(rng, (e, d), BIAS, dtype),
        activation,
    )


def gated(rng, activation=SILU, dtype=jnp.float32, sizes=(E, D, F)):
    e, d, i = sizes
    return GatedMLP(
        draw(rng, (e, i, d), WEIGHT, dtype, d**-0.5),
        draw(rng, (e, i, d), WEIGHT, dtype, d**-0.5),
        draw(rng, (e, d, i), WEIGHT, dtype, i**-0.5),
        activation=activation,
    )


def with_router(rng, experts, router=AFTER, topk=K, bias=True, selection=False):
    e, d = experts.down.size("expert"), experts.down.size("out")
    return MoE(
        experts,
        draw(rng, (e, d), ("expert", "d")),
        draw(rng, (e,), ("expert",)) if bias else None,
        experts_per_token=topk,
        router=router,
        selection_bias=draw(rng, (e,), ("expert",), scale=0.3) if selection else None,
    )


def tokens(rng, batch=2, length=4, hidden=D):
    return rng.normal(size=(batch, length, hidden)).astype(np.float32)


def distinct_ids(rng, lead, num_experts=E, topk=K):
    """Ids [*lead, topk], those of a token being different."""
    every = np.broadcast_to(np.arange(num_experts), (*lead, num_experts))
    return rng.permuted(every, axis=-1)[..., :topk]


def experts_oracle(experts):
    """One expert on one row, in float64."""
    activation = experts.activation

    def glu(gate, up):
        if activation.kind == "geglu":
            return core_oracle.gelu(gate) * up
        if activation.kind == "geglu_tanh":
            return core_oracle.gelu_tanh(gate) * up
        limit = np.inf if activation.limit is None else activation.limit
        return core_oracle.clamped_swiglu(gate, up, activation.alpha, activation.beta, limit)

    parts = {
        f.name: None if value is None else np.asarray(value.array, np.float64)
        for f in dataclasses.fields(experts)
        if f.name != "activation"
        for value in [getattr(experts, f.name)]
    }

    def gated_call(e, row):
        return parts["down"][e] @ glu(parts["gate"][e] @ row, parts["up"][e] @ row)

    def gpt_oss_call(e, row):
        both = parts["gate_up"][e] @ row + parts["gate_up_bias"][e]
        lanes = both[0::2], both[1::2]
        if activation.layout.startswith("concatenated"):
            lanes = tuple(np.split(both, 2))
        gate, up = lanes[::-1] if activation.layout.endswith("up_first") else lanes
        return parts["down"][e] @ glu(gate, up) + parts["down_bias"][e]

    return gated_call if isinstance(experts, GatedMLP) else gpt_oss_call


def layer_oracle(layer, x):
    """What a `MoE` makes of x [batch, seq, d], and which tokens are far from a tie."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    router, topk = layer.config.router, layer.config.experts_per_token
    logits = rows @ np.asarray(layer.router_weight.get_value(), np.float64).T
    if layer.router_bias is not None:
        logits = logits + np.asarray(layer.router_bias.get_value(), np.float64)
    bias = 0.0
    if layer.selection_bias is not None:
        bias = np.asarray(layer.selection_bias.get_value(), np.float64)
    ids, weights = core_oracle.route(logits, topk, router, bias)
    scores = logits
    if router.order == "before_top_k":
        scores = np.stack([core_oracle.scores_of(row, router.score) for row in logits])
    ordered = np.sort(scores + bias, axis=-1)[:, ::-1]
    clear = np.ones(len(rows), bool)
    if topk < ordered.shape[1]:
        clear = ordered[:, topk - 1] - ordered[:, topk] > 1e-5
    y = core_oracle.combine(rows, ids, weights, experts_oracle(layer.experts.tree()))
    return y.reshape(x.shape), clear.reshape(x.shape[:-1])


def compiled(model):
    return CORE.compile_model(model, "CPU", CPU_FLOAT32)


def operations(program):
    """How often each operation stands in the graph that the CPU device runs."""
    nodes = program.get_runtime_model().get_ops()
    return collections.Counter(n.get_rt_info()["layerType"].astype(str) for n in nodes)


def outputs(program, inputs):
    return {port.get_any_name(): np.array(array) for port, array in program(inputs).items()}


def assert_same_layer(one, other):
    """Two layers with the same options and the same bits."""
    assert type(one) is type(other)
    if isinstance(one, MoE):
        assert one.config == other.config
        assert jax.tree.structure(one.experts.tree()) == jax.tree.structure(other.experts.tree())
        one, other = nnx.state(one), nnx.state(other)
    core_oracle.assert_same(one, other)


@dataclasses.dataclass
class Check:
    """Records what was measured, for the table of systems, and bounds it."""

    record: object
    row: str

    def __call__(self, error):
        self.record("row", self.row)
        self.record("error", float(error))
        self.record("with", VERSION)
        assert error <= LIMIT_OF_ERROR

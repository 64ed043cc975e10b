"""State dicts of PyTorch modules, against what PyTorch and transformers computed for them."""

import dataclasses
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import layer_oracle
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import moe_jax
from moe_jax import MLP, Activation, Router, tag
from moe_jax.formats import FormatError
from moe_jax.formats.torch import (
    DROPLESS,
    GPT_OSS,
    MIXTRAL,
    MIXTRAL_CHECKPOINT,
    export_state,
    import_state,
    load_tensors,
    to_numpy,
    to_torch,
)
from moe_jax.layer import MoE
from moe_jax.losses import load_balance_loss, router_z_loss
from moe_jax.routing import route
from moe_jax.variables import value

TORCH = "torch 2.13.0"
TRANSFORMERS = "transformers 5.23.0"
EXPERTS_PER_TOKEN = 2
ROWS = {"per_token": "A3", "dense": "A2", "grouped": "A1"}
LAYOUTS = {"dropless": DROPLESS, "gpt_oss": GPT_OSS, "mixtral": MIXTRAL}

with np.load(Path(__file__).with_name("goldens_torch.npz")) as file:
    GOLDENS = dict(file)


def golden_state(name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}/state/"
    return {
        key.removeprefix(prefix): array for key, array in GOLDENS.items() if key.startswith(prefix)
    }


def golden_layer(name: str, algorithm: str = "auto") -> MoE:
    layer = import_state(golden_state(name), LAYOUTS[name], experts_per_token=EXPERTS_PER_TOKEN)
    layer.config = dataclasses.replace(layer.config, algorithm=algorithm)
    return layer


def relative(found, expected) -> float:
    """The largest error, in units of the largest number expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(abs(found - expected).max() / max(1, abs(expected).max()))


def record(record_property, row: str, error: float, real: str) -> None:
    record_property("row", row)
    record_property("error", error)
    record_property("with", real)


def test_r3_softmax_top_k_divided_by_the_sum_matches_torch(record_property):
    layer, x = golden_layer("dropless"), GOLDENS["dropless/x"]
    routing = route(layer.logits(tag(x, "s", "d")), EXPERTS_PER_TOKEN, layer.config.router)
    np.testing.assert_array_equal(routing.ids.array, GOLDENS["dropless/ids"])
    error = max(
        relative(routing.weights.array, GOLDENS["dropless/weights"]),
        relative(layer_oracle.ours(layer, x), GOLDENS["dropless/y"]),
    )
    assert error < 1e-6
    record(record_property, "R3", error, TORCH)


def test_r3_softmax_over_the_chosen_gives_the_same_weights():
    layer, x = golden_layer("dropless"), tag(GOLDENS["dropless/x"], "s", "d")
    after = route(layer.logits(x), EXPERTS_PER_TOKEN, Router())
    np.testing.assert_allclose(after.weights.array, GOLDENS["dropless/weights"], atol=1e-6)


def test_r1_the_router_of_gpt_oss_matches_transformers(record_property):
    layer, x = golden_layer("gpt_oss"), GOLDENS["gpt_oss/x"]
    routing = route(layer.logits(tag(x, "s", "d")), EXPERTS_PER_TOKEN, layer.config.router)
    np.testing.assert_array_equal(routing.ids.array, GOLDENS["gpt_oss/ids"])
    error = relative(routing.weights.array, GOLDENS["gpt_oss/weights"])
    assert error < 1e-6
    record(record_property, "R1", error, TRANSFORMERS)


@pytest.mark.parametrize("algorithm", ROWS)
def test_a1_a2_a3_every_algorithm_matches_grouped_mm(algorithm, record_property):
    found = layer_oracle.ours(golden_layer("dropless", algorithm), GOLDENS["dropless/x"])
    error = relative(found, GOLDENS["dropless/y"])
    assert error < 1e-6
    record(record_property, ROWS[algorithm], error, f"{TORCH} grouped_mm")


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("algorithm", ROWS)
def test_a1_a2_a3_every_algorithm_matches_all_of_transformers(algorithm, name, record_property):
    found = layer_oracle.ours(golden_layer(name, algorithm), GOLDENS[f"{name}/x"])
    error = max(
        relative(found, GOLDENS[f"{name}/y/{implementation}"])
        for implementation in ("eager", "grouped_mm", "batched_mm")
    )
    assert error < 1e-6
    record(record_property, ROWS[algorithm], error, TRANSFORMERS)
    if name == "gpt_oss":
        record_property("row", "E4")


def gelu_curve(kind: str) -> np.ndarray:
    """An activation applied by experts with matrices of one."""
    one = tag(jnp.ones((1, 1, 1)), "expert", "out", "in")
    layer = MoE(
        MLP(one, one, activation=Activation(kind)),
        tag(jnp.zeros((1, 1)), "expert", "d"),
        experts_per_token=1,
    )
    return np.asarray(layer_oracle.ours(layer, GOLDENS["gelu/x"][:, None]))[:, 0]


@pytest.mark.parametrize(("kind", "name"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_e2_gelu_matches_torch(kind, name, record_property):
    error = relative(gelu_curve(kind), GOLDENS[f"gelu/{name}"])
    assert error < 1e-6
    record(record_property, "E2" if kind == "gelu" else "E1", error, TORCH)


def test_trap_4_the_two_gelus_differ_by_more_than_rounding(record_property):
    apart = abs(GOLDENS["gelu/none"] - GOLDENS["gelu/tanh"]).max()
    assert 1e-4 < apart < 1e-3
    assert abs(gelu_curve("gelu") - GOLDENS["gelu/tanh"]).max() > 1e-4
    record_property("trap", "4")


def test_a1_gradients_match_torch():
    x = jnp.asarray(GOLDENS["dropless/x"])
    layer = golden_layer("dropless", "grouped")

    def loss(state: dict, x: jax.Array) -> jax.Array:
        experts = MLP(**state["experts"], activation=DROPLESS.activation)
        y = moe_jax.mixture_of_experts(
            experts,
            tag(x, "s", "d"),
            moe_jax.routing.router_logits(tag(x, "s", "d"), state["router"]),
            experts_per_token=EXPERTS_PER_TOKEN,
            normalization=DROPLESS.router,
            algorithm="grouped",
        )
        return (y.array * GOLDENS["dropless/x"]).sum()

    experts = layer.experts.tree()
    fields = {f: getattr(experts, f) for f in ("up", "up_bias", "down", "down_bias")}
    state = {"experts": fields, "router": value(layer.router_weight)}
    (found, dx) = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)
    inner = found["experts"]
    pairs = {
        "x": dx,
        "router.weight": found["router"].array,
        "w1": inner["up"].untag("expert", "in", "out"),
        "b1": inner["up_bias"].array,
        "w2": inner["down"].untag("expert", "in", "out"),
        "b2": inner["down_bias"].array,
    }
    for name, array in pairs.items():
        assert relative(array, GOLDENS[f"dropless/y/{name}"]) < 2e-6, name


@pytest.mark.parametrize("name", ["aux", "z"])
def test_l1_losses_and_their_gradients_match_autograd(name, record_property):
    layer, x = golden_layer("dropless"), jnp.asarray(GOLDENS["dropless/x"])

    def loss(weight: jax.Array, x: jax.Array) -> jax.Array:
        logits = moe_jax.routing.router_logits(tag(x, "s", "d"), tag(weight, "expert", "d"))
        if name == "z":
            return router_z_loss(logits)
        return load_balance_loss(logits, route(logits, EXPERTS_PER_TOKEN, layer.config.router))

    weight = layer.router_weight.get_value()
    found, (dweight, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weight, x)
    error = max(
        relative(found, GOLDENS[f"dropless/{name}"]),
        relative(dweight, GOLDENS[f"dropless/{name}/router.weight"]),
        relative(dx, GOLDENS[f"dropless/{name}/x"]),
    )
    assert error < 1e-6
    record(record_property, "L1", error, f"{TORCH} autograd")


def test_r6_an_id_of_minus_one_is_no_expert(record_property):
    layer, x = golden_layer("gpt_oss"), GOLDENS["gpt_oss/x"]
    ids, weights = GOLDENS["gpt_oss/ids"].astype(np.int32), GOLDENS["gpt_oss/weights"]
    ids[1, 1] = -1
    compute = jax.jit(moe_jax.fused_experts, static_argnames="algorithm")
    errors = []
    for algorithm in ROWS:
        y = compute(x, ids, weights, layer.experts.tree(), algorithm=algorithm)
        errors.append(relative(y, GOLDENS["gpt_oss/minus_one/eager"]))
        for wrong in ("grouped_mm", "batched_mm"):
            assert relative(y, GOLDENS[f"gpt_oss/minus_one/{wrong}"]) > 0.01
    assert max(errors) < 1e-6
    record(record_property, "R6", max(errors), TRANSFORMERS)
    record_property("bad_input", "id < 0")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_state_dict_comes_back_with_the_same_bits(name):
    state = golden_state(name)
    back = export_state(golden_layer(name), LAYOUTS[name], prefix="a.")
    assert sorted(back) == sorted(f"a.{key}" for key in state)
    for key, array in state.items():
        np.testing.assert_array_equal(back[f"a.{key}"], array, strict=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("layout", [MIXTRAL, MIXTRAL_CHECKPOINT], ids=["fused", "per_expert"])
def test_a_layer_comes_back_with_the_same_bits(layout, dtype, rng):
    experts = layer_oracle.gated(rng, 5, 8, 12, Activation("swiglu"), dtype, biases=False)
    layer = layer_oracle.moe(rng, experts, 5, 8, 2, router=layout.router)
    state = export_state(layer, layout)
    back = import_state(state, layout, experts_per_token=2)
    layer_oracle.assert_same_layer(back, layer)


def test_the_two_mixtral_layouts_hold_the_same_layer():
    layer = golden_layer("mixtral")
    state = export_state(layer, MIXTRAL_CHECKPOINT)
    gate, up = np.split(GOLDENS["mixtral/state/experts.gate_up_proj"], 2, axis=1)
    for expert in range(5):
        np.testing.assert_array_equal(state[f"experts.{expert}.w1.weight"], gate[expert])
        np.testing.assert_array_equal(state[f"experts.{expert}.w3.weight"], up[expert])
    back = import_state(state, MIXTRAL_CHECKPOINT, experts_per_token=2)
    layer_oracle.assert_same_layer(back, layer)


def test_a_replaced_layout_carries_another_activation(rng):
    activation = dataclasses.replace(GPT_OSS.activation, limit=3.0)
    layout = dataclasses.replace(GPT_OSS, activation=activation)
    experts = layer_oracle.gpt_oss(rng, 5, 8, 12, activation)
    bias = tag(layer_oracle.random_array(rng, jnp.float32, 5), "expert")
    layer = layer_oracle.moe(rng, experts, 5, 8, 2, router_bias=bias)
    with pytest.raises(FormatError, match="activation is .*limit=3.0"):
        export_state(layer, GPT_OSS)
    back = import_state(export_state(layer, layout), layout, experts_per_token=2)
    layer_oracle.assert_same_layer(back, layer)


def test_trap_3_square_weights_follow_the_layout(rng, record_property):
    experts = layer_oracle.mlp(rng, 5, 8, 8, Activation("gelu"))
    layer = layer_oracle.moe(rng, experts, 5, 8, 2, router=DROPLESS.router)
    state = export_state(layer, DROPLESS)
    np.testing.assert_array_equal(state["w1"], experts.up.untag("expert", "in", "out"))
    layer_oracle.assert_same_layer(import_state(state, DROPLESS, experts_per_token=2), layer)
    record_property("trap", "3")


def test_safetensors_files_and_folders_are_read(tmp_path, rng):
    state = {f"layer.{key}": array for key, array in golden_state("mixtral").items()}
    state["layer.gate.weight"] = state["layer.gate.weight"].astype(ml_dtypes.bfloat16)
    save_file({**state, "other": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_tensors(path, "layer.")
        assert sorted(found) == sorted(state)
        for key, array in state.items():
            np.testing.assert_array_equal(found[key], array, strict=True)
        import_state(found, MIXTRAL, experts_per_token=2, prefix="layer.")


class FakeTensor:
    """As much of a PyTorch tensor as is asked of one."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def detach(self) -> "FakeTensor":
        return self

    cpu = detach

    def float(self) -> "FakeTensor":
        return FakeTensor(self.array.astype(np.float32), "torch.float32")

    def numpy(self) -> np.ndarray:
        if self.dtype == "torch.bfloat16":
            raise TypeError("unsupported")
        return self.array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_read_by_what_they_can_do(dtype, rng):
    array = rng.normal(size=(5, 8)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    found = to_numpy(FakeTensor(array, f"torch.{dtype}"))
    np.testing.assert_array_equal(found, array, strict=True)


def test_pytorch_is_asked_for_only_when_tensors_are_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        to_torch({})
    fake = types.SimpleNamespace(
        bfloat16="torch.bfloat16",
        from_numpy=lambda array: types.SimpleNamespace(
            array=array, view=lambda dtype: (array, dtype)
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    ones = np.ones(2, np.float32)
    made = to_torch({"a": ones, "b": ones.astype(ml_dtypes.bfloat16)})
    assert made["a"].array is ones
    np.testing.assert_array_equal(made["b"][0], ones.astype(ml_dtypes.bfloat16).view(np.int16))
    assert made["b"][1] == "torch.bfloat16"


def changed(state: dict, **changes) -> dict:
    """A state dict with tensors replaced, or removed where the value is None."""
    state = {**state, **{name.replace("__", "."): array for name, array in changes.items()}}
    return {name: array for name, array in state.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router__weight": None}, "no tensor router.weight"),
        ({"b1": None}, r"missing are \['b1'\]"),
        ({"b3": np.zeros(3)}, r"not known are \['b3'\]"),
        ({"router__weight": np.zeros(3, np.float32)}, "hidden_size"),
        ({"w1": np.zeros((5, 12, 8), np.float32)}, "up must have .*layout"),
        ({"w2": np.zeros((4, 12, 8), np.float32)}, "down must have"),
        ({"b2": np.zeros((5, 12), np.float32)}, "down_bias must have"),
        ({"w1": np.zeros((5, 8), np.float32)}, "axes"),
        ({"w1": np.zeros((5, 8, 12), np.int8)}, "must be floats"),
        ({"w1": np.zeros((5, 8, 12))}, "must be floats .*float64|float64"),
    ],
)
def test_a_damaged_state_dict_is_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        import_state(changed(golden_state("dropless"), **changes), DROPLESS, experts_per_token=2)


def test_experts_that_are_not_alike_are_refused():
    state = export_state(golden_layer("mixtral"), MIXTRAL_CHECKPOINT)
    state["experts.3.w1.weight"] = state["experts.3.w1.weight"][:-1]
    with pytest.raises(FormatError, match="alike"):
        import_state(state, MIXTRAL_CHECKPOINT, experts_per_token=2)


def test_an_odd_fused_matrix_is_refused(record_property):
    state = golden_state("mixtral")
    state["experts.gate_up_proj"] = state["experts.gate_up_proj"][:, :-1]
    with pytest.raises(FormatError, match="no multiple"):
        import_state(state, MIXTRAL, experts_per_token=2)
    record_property("bad_input", "fused width odd")


@pytest.mark.parametrize("experts_per_token", [0, 6])
def test_an_impossible_number_of_experts_is_refused(experts_per_token, record_property):
    with pytest.raises(ValueError, match="experts_per_token"):
        import_state(golden_state("dropless"), DROPLESS, experts_per_token=experts_per_token)
    record_property("bad_input", "experts_per_token")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": Router(scale=2.0)}, "router is .*scale=2.0"),
        ({"router_bias": tag(jnp.zeros(5), "expert")}, "router_bias"),
        ({"selection_bias": tag(jnp.zeros(5), "expert")}, "selection_bias"),
        ({"tokens_per_expert_ratio": 2.0}, "tokens_per_expert_ratio"),
        ({"algorithm": "fixed_budget", "tokens_per_expert_ratio": 1.0}, "tokens_per_expert_ratio"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(options, message, rng, record_property):
    layer = layer_oracle.gelu_layer(rng, hidden=8, **{"router": DROPLESS.router, **options})
    with pytest.raises(FormatError, match=message):
        export_state(layer, DROPLESS)
    record_property("bad_input", "export of what the target cannot say")


def test_other_experts_are_refused(rng):
    experts = layer_oracle.mlp(rng, 5, 8, 12, Activation("gelu"), biases=False)
    layer = layer_oracle.moe(rng, experts, 5, 8, 2, router=DROPLESS.router)
    with pytest.raises(FormatError, match=r"needs \['down_bias', 'up_bias'\]"):
        export_state(layer, DROPLESS)
    with pytest.raises(FormatError, match="experts are MLP"):
        export_state(layer, MIXTRAL)

"""Layers of InfMoE against PyTorch, and what their files and attributes may hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import assert_same, f32, gelu_tanh, sigmoid
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from infmoe_files import EXPERTS, HIDDEN, goldens, layer_of, plugin_of, save, weights

import moe_jax
from moe_jax import Activation, MoE, Norm, Router, tag
from moe_jax.formats import FormatError, infmoe
from moe_jax.formats.infmoe import DESCRIBED_NORM, KERNEL_NORM, InfMoEPlugin
from moe_jax.variables import value

NORMS = {"rms": DESCRIBED_NORM, "layer": KERNEL_NORM, "layer_bias": KERNEL_NORM}

compiled = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time
)
run = compiled(lambda layer, x: layer(x))


@compiled
def run_with_ids(layer, x):
    routing = moe_jax.route(layer.logits(tag(x, "b", "s", "d")), 1, layer.config.router)
    return layer(x), routing.ids.array


def record(record_property, row: str, y, expected, real: str | None = None) -> None:
    """Records the greatest error relative to the greatest number, and asserts that it is small."""
    error = float(np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max())
    record_property("row", row)
    record_property("error", error)
    record_property("with", real or str(goldens()["versions"]))
    assert error < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_e6_t5_feed_forward_matches_transformers(tmp_path, norm, record_property):
    path = save(tmp_path, weights(norm == "layer_bias"))
    layer = infmoe.read_layer(plugin_of(path), norm=NORMS[norm])
    x = goldens()["x"].reshape(-1, HIDDEN)
    every = np.tile(np.arange(EXPERTS)[:, None], (1, len(x))).reshape(-1, 1)
    y = compiled(moe_jax.fused_experts)(
        np.tile(x, (EXPERTS, 1)), every, np.ones(every.shape, np.float32), layer.experts.tree()
    )
    expected = goldens()[f"experts/{norm}"].reshape(-1, HIDDEN)
    record(record_property, "E6", y, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", infmoe.VARIANTS)
def test_r4_centroids_match_torch(tmp_path, variant, norm, record_property):
    path = save(tmp_path, weights(norm == "layer_bias"))
    layer = infmoe.read_layer(plugin_of(path, moe_variant=variant), norm=NORMS[norm])
    x = jnp.asarray(goldens()["x"])
    y, ids = run_with_ids(layer, x)
    np.testing.assert_array_equal(ids[..., 0], goldens()[f"{variant}/{norm}/ids"])
    record(record_property, "R4", y, goldens()[f"{variant}/{norm}/y"])


@pytest.mark.parametrize("kind", ["geglu", "geglu_tanh"])
def test_e5_gated_gelu_matches_torch(kind, record_property):
    gate, up = (f32(goldens()[name].reshape(-1, HIDDEN), "s", "out") for name in ("gate", "up"))
    y = Activation(kind).combine(gate, up)
    record(record_property, "E5", y.array, goldens()[kind].reshape(-1, HIDDEN))


@pytest.mark.parametrize("variant", infmoe.VARIANTS)
def test_e7_identity_returns_its_input(tmp_path, variant, record_property):
    plugin = plugin_of(save(tmp_path, {}), moe_variant=variant, expert_sublayer_type="Identity")
    layer = infmoe.read_layer(plugin, norm=KERNEL_NORM)
    x = goldens()["x"]
    record(record_property, "E7", run(layer, jnp.asarray(x)), x, "the input itself")
    again = infmoe.write_layer(layer, tmp_path / "again.npz")
    assert again.expert_sublayer_type == "Identity" and again.moe_variant == variant
    with np.load(again.expert_weight_file) as file:
        assert not file.files


class Scale(nnx.Module):
    """A user's expert: every row times a vector."""

    def __init__(self, scale):
        self.scale = nnx.Param(scale)

    def __call__(self, x):
        return x * self.scale[None]


SCALE = infmoe.Sublayer(
    kind=Scale,
    shapes=lambda embedding_size, hidden_size: {"scale": (embedding_size,)},
    make=lambda arrays, norm: nnx.vmap(Scale)(jnp.asarray(arrays["scale"])),
    take=lambda experts: {"scale": np.asarray(experts.scale.get_value())},
)


def test_e7_a_flax_module_as_sublayer(tmp_path, rng, record_property):
    scales = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    path = save(tmp_path, {f"{n}/scale": scales[n] for n in range(EXPERTS)})
    sublayers = {**infmoe.SUBLAYERS, "Scale": SCALE}
    plugin = plugin_of(path, expert_sublayer_type="Scale", moe_variant="base_layer")
    layer = infmoe.read_layer(plugin, norm=KERNEL_NORM, sublayers=sublayers)
    x, centroids = goldens()["x"].astype(np.float64), goldens()["centroids"]
    affinity = x @ centroids.T
    alpha = sigmoid(affinity.max(-1))[..., None]
    expected = alpha * x * scales[affinity.argmax(-1)] + (1 - alpha) * x
    y = run(layer, jnp.asarray(goldens()["x"]))
    record(record_property, "E7", y, expected, f"NumPy {np.__version__}, float64")
    again = infmoe.write_layer(layer, tmp_path / "again.npz", sublayers=sublayers)
    assert again.expert_sublayer_type == "Scale"
    with np.load(again.expert_weight_file) as file:
        np.testing.assert_array_equal(file["3/scale"], scales[3])
    with pytest.raises(FormatError, match="no expert_sublayer_type for experts of the class Scale"):
        infmoe.write_layer(layer, tmp_path / "not.npz")


@pytest.mark.parametrize("sizes", [(4, 3, 7), (4, 4, 4)])
@pytest.mark.parametrize("variant", infmoe.VARIANTS)
def test_writing_and_reading_give_the_same_layer(tmp_path, rng, variant, sizes):
    layer = layer_of(rng, variant, KERNEL_NORM, variant == "cpm_2", sizes)
    plugin = infmoe.write_layer(layer, tmp_path / "file without suffix", max_concurrency=3)
    assert (plugin.expert_count, plugin.embedding_size) == sizes[:2]
    assert plugin.hidden_size == sizes[2] and plugin.max_concurrency == 3
    again = infmoe.read_layer(plugin, norm=KERNEL_NORM)
    assert_same(again.experts.tree(), layer.experts.tree())
    assert_same(nnx.state(again), nnx.state(layer))
    assert again.config == layer.config


def test_axes_in_another_order_are_written_as_the_format_has_them(tmp_path, rng):
    layer = layer_of(rng)
    experts = layer.experts.tree()
    turned = dataclasses.replace(
        experts,
        wi_0=experts.wi_0.order("in", "expert", "out"),
        wo=experts.wo.order("in", "out", "expert"),
    )
    other = MoE(turned, value(layer.router_weight).order("d", "expert"), experts_per_token=1)
    found = infmoe.read_layer(infmoe.write_layer(other, tmp_path / "a.npz"), norm=DESCRIBED_NORM)
    assert_same(found.experts.tree(), experts)


def infmoe_output(plugin: InfMoEPlugin, norm: Norm, x: np.ndarray) -> np.ndarray:
    """What InfMoE makes of rows [s, d] by its description, in float64, from file and attributes."""

    def normed(rows, weight, bias=0.0):
        if norm.kind == "layer":
            rows = rows - rows.mean(-1, keepdims=True)
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * weight + bias

    x, y = x.astype(np.float64), np.empty(x.shape)
    with np.load(plugin.expert_weight_file, allow_pickle=False) as file:
        for t, row in enumerate(x):
            seen = row if plugin.layernorm_weight is None else normed(row, plugin.layernorm_weight)
            affinity = plugin.expert_centroids @ seen
            n = int(affinity.argmax())
            if plugin.expert_sublayer_type == "T5_FF":
                bias = file.get(f"{n}/layer_norm_bias", 0.0)
                inner = normed(row, file[f"{n}/layer_norm_weight"], bias)
                gate, up = file[f"{n}/wi_0_weight"] @ inner, file[f"{n}/wi_1_weight"] @ inner
                y[t] = row + file[f"{n}/wo_weight"] @ (gelu_tanh(gate) * up)
            else:
                y[t] = row
            if plugin.moe_variant == "base_layer":
                alpha = sigmoid(affinity[n])
                y[t] = alpha * y[t] + (1 - alpha) * row
    return y


@pytest.mark.parametrize("norm", [DESCRIBED_NORM, KERNEL_NORM])
def test_square_weights_keep_their_orientation(tmp_path, rng, norm, record_property):
    layer = layer_of(rng, "base_layer", norm, bias=True, sizes=(3, 4, 4))
    x = rng.normal(size=(6, 4)).astype(np.float32)
    plugin = infmoe.write_layer(layer, tmp_path / "a.npz")
    expected = infmoe_output(plugin, norm, x)
    np.testing.assert_allclose(run(layer, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    read = run(infmoe.read_layer(plugin, norm=norm), jnp.asarray(x))
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5)
    record_property("trap", "3")


def test_gelu_of_t5_is_the_approximation_by_tanh(tmp_path, record_property):
    layer = infmoe.read_layer(plugin_of(save(tmp_path, weights())), norm=DESCRIBED_NORM)
    x, expected = jnp.asarray(goldens()["x"]), goldens()["default/rms/y"]
    experts = dataclasses.replace(layer.experts.tree(), activation=Activation("geglu"))
    erf = MoE(experts, value(layer.router_weight), experts_per_token=1)
    assert (
        np.abs(run(layer, x) - expected).max() < 1e-5 < 1e-4 < np.abs(run(erf, x) - expected).max()
    )
    record_property("trap", "4")


CHANGES = [
    ("experts", "GatedMLP"),
    ("eps", 1e-5),
    ("activation", "geglu"),
    ("activation", "reglu"),
    ("router", Router("sigmoid")),
    ("router", Router(scale=2.0)),
    ("remaining_weight", "input"),
    ("router_norm", DESCRIBED_NORM),
    ("router_norm", KERNEL_NORM),
    ("experts_per_token", 2),
    ("bias_of", "router"),
    ("bias_of", "selection"),
    ("ratio", 1.0),
]
USUAL = {
    "eps": 1e-6,
    "activation": "geglu_tanh",
    "experts_per_token": 1,
    "bias_of": None,
    "ratio": None,
}


@st.composite
def layers(draw):
    """What InfMoE can say, with up to two changes, which it mostly cannot."""
    variant = infmoe.VARIANTS[draw(st.sampled_from([*infmoe.VARIANTS]))]
    norm = draw(st.sampled_from([DESCRIBED_NORM, KERNEL_NORM]))
    return {
        **USUAL,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "experts": draw(st.sampled_from(["T5_FF", "Identity"])),
        "norm": norm,
        "bias": norm == KERNEL_NORM,
        "router": variant.router,
        "remaining_weight": variant.remaining_weight,
        "router_norm": norm if variant.router_norm else None,
        **dict(draw(st.lists(st.sampled_from(CHANGES), max_size=2))),
    }


NAMES = (
    "experts of the class|norm|activation|router|remaining_weight|experts_per_token|"
    "router_bias|selection_bias|tokens_per_expert_ratio"
)


def random_layer(rng, choice) -> MoE:
    norm = dataclasses.replace(choice["norm"], eps=choice["eps"])
    bare = layer_of(rng, norm=norm, bias=choice["bias"]).experts.tree()
    experts = {
        "T5_FF": dataclasses.replace(bare, activation=Activation(choice["activation"])),
        "Identity": moe_jax.Identity(),
        "GatedMLP": moe_jax.GatedMLP(bare.wi_0, bare.wi_1, bare.wo),
    }[choice["experts"]]
    vector = f32(rng.normal(size=4), "expert")
    return MoE(
        experts,
        f32(rng.normal(size=(4, 3)), "expert", "d"),
        vector if choice["bias_of"] == "router" else None,
        selection_bias=vector if choice["bias_of"] == "selection" else None,
        experts_per_token=choice["experts_per_token"],
        router=choice["router"],
        remaining_weight=choice["remaining_weight"],
        router_norm_weight=f32(rng.normal(size=3), "d") if choice["router_norm"] else None,
        router_norm=choice["router_norm"] or Norm(),
        tokens_per_expert_ratio=choice["ratio"],
        algorithm="auto" if choice["ratio"] else "dense",
    )


def test_random_layers_are_written_so_that_infmoe_computes_them_or_refused(tmp_path):
    path, outcomes = tmp_path / "any.npz", {True: 0, False: 0}

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(choice=layers())
    def sweep(choice):
        rng = np.random.default_rng(choice["seed"])
        layer = random_layer(rng, choice)
        path.unlink(missing_ok=True)
        try:
            plugin = infmoe.write_layer(layer, path)
        except FormatError as error:
            assert any(name in str(error) for name in NAMES.split("|"))
            assert not path.exists()
        else:
            x = rng.normal(size=(6, 3)).astype(np.float32)
            expected = infmoe_output(plugin, choice["norm"], x)
            np.testing.assert_allclose(run(layer, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
        outcomes[path.exists()] += 1

    sweep()
    assert min(outcomes.values()) > 100

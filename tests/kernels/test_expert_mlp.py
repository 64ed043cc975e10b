"""The layer of gpt-oss experts: what it computes, and what is lowered.

Values on the CPU are those of the definition; the kernels are interpreted by another file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_mlp_oracle import Layer
from jax.sharding import PartitionSpec as P
from triton_tools import MISSING, run_interpreted

import moe_jax
from moe_jax import Router, Routing, Tagged, tag
from moe_jax.kernels import kernel_call
from moe_jax.kernels.dispatch import launch as dispatch
from moe_jax.kernels.expert_mlp import launch
from moe_jax.kernels.expert_mlp.api import Logits, expert_mlp, is_supported
from moe_jax.kernels.tiled_matmul import launch as matmul

pytestmark = pytest.mark.usefixtures("little_compiling")

EXPERTS, HIDDEN, INTERMEDIATE, K = 5, 64, 96, 2
ATOL = 0.6
"""What bfloat16 leaves of sums of 96 terms of a size of up to 20."""


@pytest.fixture(scope="module")
def oracle() -> Layer:
    return Layer.random(np.random.default_rng(3), EXPERTS, HIDDEN, INTERMEDIATE)


def rows(rng: np.random.Generator, tokens: int) -> tuple[jax.Array, np.ndarray]:
    """bfloat16 [tokens, HIDDEN], and the same numbers in float64."""
    x = jnp.asarray(rng.normal(size=(tokens, HIDDEN)), jnp.bfloat16)
    return x, np.asarray(x, np.float64)


def routing(ids: np.ndarray, weights: np.ndarray) -> Routing:
    return Routing(
        tag(jnp.asarray(ids, jnp.int32), "s", "top_expert"),
        tag(jnp.asarray(weights, jnp.float32), "s", "top_expert"),
    )


@jax.jit
def from_logits(experts, x, logits, mask=None):
    return moe_jax.mixture_of_experts(experts, x, logits, experts_per_token=K, token_mask=mask)


@jax.jit
def from_ids(experts, x, ids, weights, mask=None):
    return moe_jax.fused_experts(x, ids, weights, experts, token_mask=mask)


def check(y, expected) -> None:
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.03, atol=ATOL)


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_from_logits(oracle, tokens, rng):
    (x, wide), logits = rows(rng, tokens), rng.normal(size=(tokens, EXPERTS)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    check(from_logits(oracle.tiled(), x, logits), oracle.routed(wide, logits, K))
    mask = rng.random(tokens) < 0.5
    y = from_logits(oracle.tiled(), x, logits, mask)
    check(y, oracle.routed(wide, logits, K, mask))
    assert not np.asarray(y)[~mask].any()


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_from_ids(oracle, tokens, rng):
    x, wide = rows(rng, tokens)
    ids = rng.integers(-2, EXPERTS + 2, (tokens, 3), dtype=np.int32)
    weights = rng.random((tokens, 3)).astype(np.float32)
    check(from_ids(oracle.tiled(), x, ids, weights), oracle(wide, ids, weights))
    mask = rng.random(tokens) < 0.5
    expected = oracle(wide, np.where(mask[:, None], ids, -1), weights)
    check(from_ids(oracle.tiled(), x, ids, weights, mask), expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_other_routers(oracle, with_bias, rng):
    """Routing that the kernels do not do is done before them."""
    (x, _), logits = rows(rng, 12), rng.normal(size=(12, EXPERTS)).astype(np.float32)
    router = Router("sigmoid", "before_top_k", renormalize=True)
    options = {"normalization": router, "experts_per_token": K}
    if with_bias:
        options["selection_bias"] = jnp.asarray(rng.normal(size=EXPERTS), jnp.float32)
    y = moe_jax.mixture_of_experts(oracle.tiled(), x, logits, **options)
    chosen = moe_jax.route(
        tag(jnp.asarray(logits), "s", "expert"),
        K,
        router,
        selection_bias=tag(options["selection_bias"], "expert") if with_bias else None,
    )
    expected = oracle(np.asarray(x, np.float64), *(np.asarray(a) for a in jax.tree.leaves(chosen)))
    check(y, expected)


def test_nan_shows_in_its_token_only(oracle, rng):
    (x, _), logits = rows(rng, 8), rng.normal(size=(8, EXPERTS)).astype(np.float32)
    clean = from_logits(oracle.tiled(), x, logits)
    logits[2, 1], logits[5] = np.nan, -np.inf
    y = np.asarray(from_logits(oracle.tiled(), x.at[6, 3].set(jnp.nan), logits), np.float64)
    np.testing.assert_array_equal(np.isnan(y).all(1), np.isin(np.arange(8), [2, 6]))
    np.testing.assert_array_equal(y[5], 0)
    others = np.array([0, 1, 3, 4, 7])
    np.testing.assert_array_equal(y[others], np.asarray(clean, np.float64)[others])


def test_report(oracle, rng):
    x, _ = rows(rng, 6)
    y, report = moe_jax.mixture_of_experts(
        oracle.tiled(), x, jnp.zeros((6, EXPERTS)), experts_per_token=K, with_report=True
    )
    assert y.shape == x.shape
    assert [int(n) for n in jax.tree.leaves(report)] == [6 * K, 0, 0, 0]


def check_slopes(gradients, exact, arguments, rng) -> None:
    """Compares the slopes along random directions with differences of `exact`, in float64."""
    for n, gradient in enumerate(gradients):
        direction = rng.normal(size=arguments[n].shape)
        ends = []
        for sign in (1, -1):
            moved = list(arguments)
            moved[n] = arguments[n] + sign * 1e-6 * direction
            ends.append(exact(*moved))
        slope = (ends[0] - ends[1]) / 2e-6
        gradient = np.asarray(gradient, np.float64)
        # the slope along a random direction is of the gradient's length
        error = abs((gradient * direction).sum() - slope)
        assert error < 0.05 * np.linalg.norm(gradient), n


@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients(oracle, tokens, rng):
    (x, wide), logits = rows(rng, tokens), rng.normal(size=(tokens, EXPERTS))
    cotangent = rng.normal(size=(tokens, HIDDEN))
    mask = np.arange(tokens) != 1
    experts = oracle.tiled()

    def loss(x, logits, gate_up_bias, down_bias):
        own = dataclasses.replace(
            experts,
            gate_up_bias=tag(gate_up_bias, "expert", "out"),
            down_bias=tag(down_bias, "expert", "out"),
        )
        return (from_logits(own, x, logits, mask).astype(jnp.float32) * cotangent).sum()

    def exact(x, logits, gate_up_bias, down_bias):
        own = dataclasses.replace(oracle, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return (own.routed(x, logits, K, mask) * cotangent).sum()

    arguments = (wide, logits, oracle.gate_up_bias, oracle.down_bias)
    narrow = (jnp.asarray(a, jnp.float32) for a in arguments[1:])
    check_slopes(jax.grad(loss, (0, 1, 2, 3))(x, *narrow), exact, arguments, rng)


def test_gradients_of_given_weights(oracle, rng):
    x, wide = rows(rng, 7)
    ids, weights = rng.integers(-1, EXPERTS + 1, (7, 3), dtype=np.int32), rng.random((7, 3))
    cotangent, experts = rng.normal(size=(7, HIDDEN)), oracle.tiled()

    def loss(x, weights):
        return (from_ids(experts, x, ids, weights).astype(jnp.float32) * cotangent).sum()

    def exact(x, weights):
        return (oracle(x, ids, weights) * cotangent).sum()

    gradients = jax.grad(loss, (0, 1))(x, jnp.asarray(weights, jnp.float32))
    assert not np.asarray(gradients[1])[(ids < 0) | (ids >= EXPERTS)].any()
    check_slopes(gradients, exact, (wide, weights), rng)


def test_packed_weights_have_no_gradient(oracle, rng):
    (x, _), logits = rows(rng, 4), rng.normal(size=(4, EXPERTS)).astype(np.float32)
    gradient = jax.grad(
        lambda e: from_logits(e, x, logits).astype(jnp.float32).sum(), allow_int=True
    )(oracle.tiled())
    for weight in (gradient.gate_up, gradient.down):
        assert weight.words.array.dtype == jax.dtypes.float0
        assert not np.asarray(weight.factor.array).any()
    assert np.asarray(gradient.down_bias.array).any()


def test_inside_other_transformations(oracle, rng):
    experts = oracle.tiled()
    (x, _), logits = rows(rng, 8), jnp.asarray(rng.normal(size=(8, EXPERTS)), jnp.float32)
    one = from_logits(experts, x, logits)
    both = jnp.stack([x, x[::-1]]), jnp.stack([logits, logits[::-1]])
    mapped = jax.jit(jax.vmap(from_logits, (None, 0, 0)))(experts, *both)
    np.testing.assert_array_equal(mapped[0], one)
    np.testing.assert_array_equal(mapped[1], one[::-1])
    _, scanned = jax.lax.scan(lambda c, a: (c, from_logits(experts, *a)), 0, both)
    np.testing.assert_array_equal(scanned, mapped)
    looped = jax.lax.fori_loop(0, 2, lambda _, y: from_logits(experts, y, logits), x)
    np.testing.assert_array_equal(looped, from_logits(experts, one, logits))
    mesh = jax.make_mesh((4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P("device")
    sharded = jax.jit(
        jax.shard_map(from_logits, mesh=mesh, in_specs=(P(), spec, spec), out_specs=spec)
    )
    check(sharded(experts, x, logits), np.asarray(one, np.float64))


def test_gradients_under_shard_map(oracle, rng):
    """Of rows and logits, which are sharded, and of biases, which every device has."""
    (x, _), logits = rows(rng, 8), jnp.asarray(rng.normal(size=(8, EXPERTS)), jnp.float32)
    experts, cotangent = oracle.tiled(), rng.normal(size=(8, HIDDEN))
    mesh = jax.make_mesh((4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P("device")
    sharded = jax.shard_map(from_logits, mesh=mesh, in_specs=(P(), spec, spec), out_specs=spec)

    def gradients(layer):
        def loss(biases, x, logits):
            y = layer(dataclasses.replace(experts, **biases), x, logits)
            return (y.astype(jnp.float32) * cotangent).sum()

        biases = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(biases, x, logits)
        return [np.asarray(g, np.float64) for g in jax.tree.leaves(found)]

    for ours, expected in zip(gradients(sharded), gradients(from_logits), strict=True):
        assert expected.any()
        assert np.linalg.norm(ours - expected) < 0.01 * np.linalg.norm(expected)


@jax.jit
def without_experts(experts, x, weights):
    return moe_jax.fused_experts(x, jnp.zeros((3, 0), jnp.int32), weights, experts)


def test_no_experts_per_token(monkeypatch, oracle, rng):
    (x, _), weights = rows(rng, 3), jnp.zeros((3, 0))
    y = without_experts(oracle.tiled(), x, weights)
    assert y.shape == x.shape and y.dtype == x.dtype and not np.asarray(y).any()
    pytest.importorskip("triton", reason=MISSING)
    pytest.importorskip("jax_triton", reason=MISSING)
    assert not lowered(monkeypatch, 90, without_experts, oracle.tiled(), x, weights)


def tagged(oracle: Layer, tokens: int) -> tuple[moe_jax.GptOssMLP, Tagged]:
    return oracle.tiled(), tag(jnp.zeros((tokens, HIDDEN), jnp.bfloat16), "s", "d")


def test_what_is_supported(oracle):
    experts, x = tagged(oracle, 3)
    assert is_supported(experts, x)
    assert not is_supported(oracle.ours(), x)
    assert not is_supported(experts, x.astype(jnp.float32))
    up_first = dataclasses.replace(experts.activation, layout="interleaved_up_first")
    assert not is_supported(dataclasses.replace(experts, activation=up_first), x)


def test_refuses(oracle):
    experts, x = tagged(oracle, 3)
    good = routing(np.zeros((3, K)), np.ones((3, K)))
    with pytest.raises(TypeError, match="takes a GptOssMLP .* got GptOssMLP and rows of float32"):
        expert_mlp(experts, x.astype(jnp.float32), good)
    with pytest.raises(ValueError, match="down_bias must have the sizes"):
        expert_mlp(dataclasses.replace(experts, down_bias=experts.gate_up_bias), x, good)
    with pytest.raises(ValueError, match="gate_up must have the sizes"):
        expert_mlp(dataclasses.replace(experts, gate_up=experts.down), x, good)
    with pytest.raises(ValueError, match="axis 's' has different sizes"):
        expert_mlp(experts, x, routing(np.zeros((4, K)), np.ones((4, K))))
    with pytest.raises(ValueError, match="expected logits of 5 experts"):
        expert_mlp(experts, x, Logits(tag(jnp.zeros((3, 6)), "s", "expert"), None, K))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        expert_mlp(experts, x, good, implementation="triton")


def lowered(monkeypatch, capability, function, *arguments) -> list[tuple[str, dict]]:
    """The kernels that a function is lowered to for CUDA: names, and the options of the calls."""
    called = []

    def call(kernel, *_, out_type, **options):
        called.append((kernel.fn.__name__, options))
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)

    monkeypatch.setattr(matmul, "_call", call)
    monkeypatch.setattr(dispatch, "_call", call)
    monkeypatch.setattr(matmul, "cuda_capability", lambda: capability)
    jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return called


MATMULS = ["gate_up_kernel", "down_kernel"]  # the sizes are not whole tiles


@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_lowered(monkeypatch, oracle, capability):
    pytest.importorskip("triton", reason=MISSING)
    pytest.importorskip("jax_triton", reason=MISSING)
    experts = oracle.tiled()

    def names(function, *arguments):
        return [name for name, _ in lowered(monkeypatch, capability, function, *arguments)]

    def layer(x, logits, mask=None):
        return moe_jax.mixture_of_experts(
            experts, x, logits, experts_per_token=K, token_mask=mask, with_report=True
        )

    for tokens, route in ((0, []), (1, ["route_once"]), (9000, ["route_chunk", "place_pairs"])):
        x, logits = jnp.zeros((tokens, HIDDEN), jnp.bfloat16), jnp.zeros((tokens, EXPERTS))
        expected = [*route, *MATMULS, "combine_pairs"] if tokens else []
        assert names(layer, x, logits) == expected
        assert names(layer, x, logits, jnp.ones(tokens, bool)) == expected
        ids, weights = jnp.zeros((tokens, K), jnp.int32), jnp.zeros((tokens, K))
        sort = {0: [], 1: ["sort_once"], 9000: ["sort_chunk", "place_pairs"]}[tokens]
        found = names(lambda *a: moe_jax.fused_experts(*a, experts), x, ids, weights)
        assert found == ([*sort, *MATMULS, "combine_pairs"] if tokens else [])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 50])
def test_kernels_are_called_with_what_they_take(monkeypatch, capability, tokens):
    """Traced as for a GPU: arrays, sizes and constants are bound to the parameters."""
    pytest.importorskip("jax_triton", reason=MISSING)
    experts = Layer.random(np.random.default_rng(0), 4, 64, 128).tiled()
    compiled = []

    def compile_kernel(kernel, kinds, constants, options, capability):
        compiled.append(kernel_call.kernel_source(kernel, kinds, dict(constants)))
        return kernel_call.Code(kernel.__name__, "", 0, options.num_warps, capability)

    monkeypatch.setattr(matmul, "cuda_capability", lambda: capability)
    monkeypatch.setattr(kernel_call, "cuda_capability", lambda: capability)
    monkeypatch.setattr(kernel_call, "compile_kernel", compile_kernel)
    monkeypatch.setattr(kernel_call, "_launch", lambda *_: b"")

    def calls(x, logits, ids, weights, sizes):
        return (
            launch.routed_layer(experts, x, logits, None, None, 2),
            launch.layer(experts, x, ids, weights),
            matmul.multiply_rows(x, experts.gate_up, sizes),
        )

    shapes = (tokens, 64), (tokens, 4), (tokens, 2), (tokens, 2), (4,)
    dtypes = jnp.bfloat16, jnp.float32, jnp.int32, jnp.float32, jnp.int32
    jaxpr = jax.make_jaxpr(calls)(*map(jax.ShapeDtypeStruct, shapes, dtypes))
    assert [a.shape for a in jaxpr.out_avals] == [(tokens, 64), (tokens, 64), (tokens, 256)]
    assert {a.dtype for a in jaxpr.out_avals} == {jnp.dtype("bfloat16")}
    plain = [e.params for e in jaxpr.eqns if e.primitive.name == "triton_kernel_call"]
    # of each layer two kernels or one, and the grouped matmul; routing, sorting, and two sums
    assert len(compiled) == ((5 if tokens == 1 else 3) if capability == 90 else 0)
    others = 3 if capability == 90 and tokens == 1 else 4
    assert len(plain) + len(compiled) == others + (len(compiled) or 5)
    for params in plain:
        names = {p.name for p in params["fn"].params if p.is_constexpr}
        assert set(params["metaparams"]) == names


def test_named_algorithms_and_other_types_stay_in_xla(monkeypatch, oracle):
    pytest.importorskip("jax_triton", reason=MISSING)
    x, logits = jnp.zeros((3, HIDDEN), jnp.bfloat16), jnp.zeros((3, EXPERTS))

    def count(experts, x, algorithm):
        def layer(x):
            return moe_jax.mixture_of_experts(
                experts, x, logits, experts_per_token=K, algorithm=algorithm
            )

        return len([n for n, _ in lowered(monkeypatch, 90, layer, x) if n in MATMULS])

    tiled = oracle.tiled()
    assert count(tiled, x, "auto") == count(tiled, x, "grouped") == 2
    assert count(tiled, x, "per_token") == count(tiled, x, "dense") == 0
    assert count(tiled, x.astype(jnp.float32), "auto") == count(oracle.ours(), x, "auto") == 0


@pytest.mark.slow
def test_interpreted():
    pytest.importorskip("triton", reason=MISSING)
    run_interpreted("interpreted_expert_mlp.py")

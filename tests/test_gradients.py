"""Gradients of every algorithm against central differences of NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import clamped_swiglu, expert_choice, f32, route, softmax, weight

import moe_jax
from moe_jax import Router, mixture_of_experts

pytestmark = pytest.mark.usefixtures("little_compiling")

EXPERTS, HIDDEN, WIDE, K = 4, 5, 3, 2
NAMES = ("gate_up", "gate_up_bias", "down", "down_bias", "x", "logits")


def values_of(rng, tokens: int) -> dict[str, np.ndarray]:
    shapes = {
        "gate_up": (EXPERTS, 2 * WIDE, HIDDEN),
        "gate_up_bias": (EXPERTS, 2 * WIDE),
        "down": (EXPERTS, HIDDEN, WIDE),
        "down_bias": (EXPERTS, HIDDEN),
        "x": (tokens, HIDDEN),
        "logits": (tokens, EXPERTS),
    }
    draw = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return {n: a.astype(np.float64) for n, a in draw.items()}


def oracle(v: dict[str, np.ndarray], kept: list[list[int]], weigh, cotangent: np.ndarray) -> float:
    """sum(y * cotangent) of the gpt-oss layer, with the choice of experts held fixed."""
    total = 0.0
    for t, ids in enumerate(kept):
        if not ids:
            continue
        h = v["gate_up"][ids] @ v["x"][t] + v["gate_up_bias"][ids]
        hidden = clamped_swiglu(h[:, 0::2], h[:, 1::2], 1.702, 1.0, 7.0)
        y = (v["down"][ids] @ hidden[:, :, None])[:, :, 0] + v["down_bias"][ids]
        total += float(weigh(v["logits"][t], ids) @ y @ cotangent[t])
    return total


def differences(v: dict[str, np.ndarray], function, step: float = 1e-5) -> dict[str, np.ndarray]:
    result = {}
    for name, array in v.items():
        gradient = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                ends.append(function({**v, name: moved}))
            gradient[index] = (ends[0] - ends[1]) / (2 * step)
        result[name] = gradient
    return result


def after(row, ids):
    return softmax(row[ids])


def before_renormalized(row, ids):
    scores = 1 / (1 + np.exp(-row[ids]))
    return scores / scores.sum()


ROUTERS = {
    "gpt_oss": (Router(), after),
    "sigmoid": (Router("sigmoid", "before_top_k", renormalize=True), before_renormalized),
}


def ours_of(v, cotangent, **options) -> dict[str, np.ndarray]:
    def loss(layer, x, logits):
        y = mixture_of_experts(layer, x, logits, experts_per_token=K, **options)
        return (y.array * jnp.asarray(cotangent, jnp.float32)).sum()

    layer = moe_jax.GptOssMLP(
        weight(v["gate_up"]), f32(v["gate_up_bias"], "expert", "out"),
        weight(v["down"]), f32(v["down_bias"], "expert", "out"),
    )  # fmt: skip
    arguments = layer, f32(v["x"], "s", "d"), f32(v["logits"], "s", "expert")
    of_layer, of_x, of_logits = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    found = {n: getattr(of_layer, n).array for n in NAMES[:4]}
    return {**found, "x": of_x.array, "logits": of_logits.array}


def check(ours, expected):
    for name in NAMES:
        error = np.linalg.norm(np.asarray(ours[name], np.float64) - expected[name])
        assert error <= 1e-4 * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_exact_algorithms(rng, tokens, router):
    v, cotangent = values_of(rng, tokens), rng.normal(size=(tokens, HIDDEN))
    settings, weigh = ROUTERS[router]
    kept = [list(row) for row in route(v["logits"], K, settings)[0]]
    function = functools.partial(oracle, kept=kept, weigh=weigh, cotangent=cotangent)
    expected = differences(v, function)
    for algorithm in ("per_token", "dense", "grouped"):
        check(ours_of(v, cotangent, algorithm=algorithm, normalization=settings), expected)


@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_fixed_budget(rng, overflow):
    v, cotangent = values_of(rng, 14), rng.normal(size=(14, HIDDEN))
    v["logits"][:, 1] += 3
    ratio = 0.9
    budget = moe_jax.dispatch.token_budget(14, EXPERTS, K, ratio)
    plan = expert_choice(v["logits"], softmax(v["logits"]), K, budget, overflow)
    assert plan.dropped > 0
    function = functools.partial(oracle, kept=plan.kept, weigh=after, cotangent=cotangent)
    ours = ours_of(
        v, cotangent, algorithm="fixed_budget", tokens_per_expert_ratio=ratio, overflow=overflow
    )
    check(ours, differences(v, function))

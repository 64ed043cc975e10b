"""Experts that users bring: pytrees of bare or tagged arrays, and Flax modules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import combine, f32, moe, ratio_for, softmax, weight
from flax import nnx

import moe_jax
from moe_jax import Tagged
from moe_jax.experts.base import OneExpert

EXPERTS, HIDDEN = 4, 5
ALGORITHMS = ["per_token", "dense", "grouped", "fixed_budget"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BareAffine:
    """Bare leaves: scale [expert, d], shift [expert, d]."""

    scale: jax.Array
    shift: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        assert self.scale.shape == (HIDDEN,) and x.ndim == 2
        return x * self.scale[None] + self.shift[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaggedAffine:
    """Tagged leaves, the expert axis not in front; strict about the names of its rows."""

    scale: Tagged
    shift: Tagged

    def __call__(self, x: Tagged) -> Tagged:
        return x.order("s", "d") * self.scale + self.shift


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Without any array."""

    def __call__(self, x: Any) -> Any:
        return x


@nnx.split_rngs(splits=EXPERTS)
@nnx.vmap(in_axes=0, out_axes=0)
def make_linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)


@pytest.fixture
def data(rng):
    x, logits = rng.normal(size=(7, HIDDEN)), rng.normal(size=(7, EXPERTS))
    return x.astype(np.float32), logits.astype(np.float32)


def expected_of(data, one) -> np.ndarray:
    x, logits = data
    ids = np.argsort(-logits, 1)[:, :2]
    return combine(x, ids, softmax(np.take_along_axis(logits, ids, 1)), one)


def call(experts, x, gating, algorithm):
    return moe(
        experts,
        x,
        gating,
        experts_per_token=2,
        algorithm=algorithm,
        tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
    )  # fmt: skip


def tag_both(data):
    return f32(data[0], "s", "d"), f32(data[1], "s", "expert")


def bare_both(data):
    return jnp.asarray(data[0]), jnp.asarray(data[1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bare_dataclass(rng, data, algorithm):
    a, b = rng.normal(size=(2, EXPERTS, HIDDEN)).astype(np.float32)
    y = call(BareAffine(jnp.asarray(a), jnp.asarray(b)), *bare_both(data), algorithm)
    assert isinstance(y, jax.Array)
    np.testing.assert_allclose(y, expected_of(data, lambda e, r: a[e] * r + b[e]), atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tagged_dataclass(rng, data, algorithm):
    a, b = rng.normal(size=(2, EXPERTS, HIDDEN)).astype(np.float32)
    experts = TaggedAffine(f32(a.T, "d", "expert"), f32(b, "expert", "d"))
    y = call(experts, *tag_both(data), algorithm)
    assert y.axes == ("s", "d")
    np.testing.assert_allclose(y.array, expected_of(data, lambda e, r: a[e] * r + b[e]), atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_flax_module(data, algorithm):
    linear = make_linear(nnx.Rngs(3))
    kernel = np.asarray(linear.kernel.get_value(), np.float64)
    y = jax.jit(call, static_argnums=3)(linear, *bare_both(data), algorithm)
    np.testing.assert_allclose(y, expected_of(data, lambda e, r: r @ kernel[e]), atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_experts_without_arrays(data, algorithm):
    for both in (tag_both, bare_both):
        for experts in (Unchanged(), moe_jax.Identity()):
            y = call(experts, *both(data), algorithm)
            np.testing.assert_allclose(getattr(y, "array", y), data[0], rtol=1e-5, atol=1e-6)


def test_gradients_agree_between_algorithms(rng, data):
    a, b = rng.normal(size=(2, EXPERTS, HIDDEN)).astype(np.float32)
    experts = BareAffine(jnp.asarray(a), jnp.asarray(b))
    x, logits = data
    ids = np.argsort(-logits, 1)[:, :2]
    weights = softmax(np.take_along_axis(logits, ids, 1))
    scale, shift = np.zeros((2, EXPERTS, HIDDEN))
    for t, e in np.ndindex(7, 2):
        scale[ids[t, e]] += weights[t, e] * x[t]
        shift[ids[t, e]] += weights[t, e]
    for algorithm in ALGORITHMS:
        gradient = jax.grad(lambda m, name=algorithm: call(m, *bare_both(data), name).sum())(
            experts
        )
        np.testing.assert_allclose(gradient.scale, scale, atol=1e-5)
        np.testing.assert_allclose(gradient.shift, shift, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_experts_return_is_checked(data, algorithm):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        w: Any
        kind: str = dataclasses.field(metadata={"static": True})

        def __call__(self, x):
            if self.kind == "narrow":
                return x[:, :2]
            if self.kind == "tagged":
                return f32(np.ones(x.shape), "s", "d")
            if self.kind == "renamed":
                return x.rename(d="out")
            return x.array

    bare = jnp.ones((EXPERTS, 2))
    for kind in ("narrow", "tagged"):
        with pytest.raises(ValueError, match="an expert called on a bare array .* returned"):
            call(Wrong(bare, kind), *bare_both(data), algorithm)
    for kind in ("renamed", "untagged"):
        with pytest.raises(ValueError, match="an expert must return rows like those it gets"):
            call(Wrong(f32(np.ones((EXPERTS, 2)), "expert", "q"), kind), *tag_both(data), algorithm)


def test_leaves_without_an_expert_axis_are_refused(data):
    bad = BareAffine(jnp.ones((EXPERTS, HIDDEN)), jnp.asarray(1.0))
    with pytest.raises(ValueError, match=r"\.shift has no axes: expected an expert axis in front"):
        call(bad, *bare_both(data), "auto")
    short = BareAffine(jnp.ones((EXPERTS, HIDDEN)), jnp.ones((3, HIDDEN)))
    with pytest.raises(ValueError, match=r"\.shift holds 3 experts, the gating has 4"):
        call(short, *bare_both(data), "auto")


def test_a_single_expert_may_call_another(data):
    """`Rows.call` with one expert is its call."""
    x = f32(data[0], "s", "d")
    np.testing.assert_array_equal(OneExpert().call(Unchanged(), x).array, data[0])


def test_subclass_of_expert_with_select(rng, data):
    """A layer of one's own, written against Rows."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Scaled(moe_jax.Expert):
        scale: Tagged
        mix: Tagged

        def apply(self, x, rows):
            y = rows.linear(x.rename(d="in"), self.mix).rename(out="d")
            return y * rows.select(self.scale).rename(feature="d")

    a = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    w = rng.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)
    experts = Scaled(f32(a, "expert", "feature"), weight(w))
    expected = expected_of(data, lambda e, r: a[e] * (w[e].astype(float) @ r))
    for algorithm in ALGORITHMS:
        y = call(experts, *tag_both(data), algorithm)
        np.testing.assert_allclose(y.array, expected, atol=2e-5)
    one = jax.tree.map(
        lambda leaf: leaf.take(0, "expert"), experts, is_leaf=moe_jax.tagged.is_tagged
    )
    np.testing.assert_allclose(
        one(jnp.asarray(data[0])), (data[0] @ w[0].T) * a[0][None], atol=1e-5
    )

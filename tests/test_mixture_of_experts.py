"""The one entry: its options, the kinds of arrays it takes, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import TinyExperts, combine, f32, moe, ratio_for, route

import moe_jax
from moe_jax import Router, fused_experts, mixture_of_experts, tag
from moe_jax.routing import LINEAR_ROUTER

EXPERTS, HIDDEN, TOKENS, K = 6, 5, 8, 2
GPT_OSS = Router()
EXACT = ("per_token", "dense", "grouped")


@pytest.fixture(scope="module")
def experts() -> TinyExperts:
    return TinyExperts.random(np.random.default_rng(3), EXPERTS, HIDDEN)


@pytest.fixture(scope="module")
def ours(experts) -> moe_jax.GatedMLP:
    return experts.ours()


@pytest.fixture
def x(rng) -> np.ndarray:
    return rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)


@pytest.fixture
def logits(rng) -> np.ndarray:
    return rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)


def close(y, expected):
    np.testing.assert_allclose(y, expected, rtol=5e-5, atol=5e-5)


def expected_of(experts, x, logits, router=GPT_OSS):
    return combine(x, *route(logits, K, router), experts)


def test_kinds_of_arrays(experts, ours, x, logits):
    expected = expected_of(experts, x, logits)
    call = functools.partial(moe, ours, experts_per_token=K)
    bare = call(jnp.asarray(x), jnp.asarray(logits))
    assert isinstance(bare, jax.Array)
    close(bare, expected)
    tagged = call(f32(x.T, "d", "s"), f32(logits.T, "expert", "s"))
    assert tagged.axes == ("d", "s")
    close(tagged.array.T, expected)
    mixed = call(f32(x, "s", "d"), jnp.asarray(logits))
    close(mixed.untag("s", "d"), expected)


def test_several_token_axes(experts, ours, x, logits):
    expected = expected_of(experts, x, logits).reshape(2, 4, HIDDEN)
    x3, logits3 = x.reshape(2, 4, HIDDEN), logits.reshape(2, 4, EXPERTS)
    call = functools.partial(moe, ours, experts_per_token=K)
    y = call(f32(x3, "b", "s", "d"), f32(logits3, "b", "s", "expert"))
    assert y.sizes == {"b": 2, "s": 4, "d": HIDDEN}
    close(y.array, expected)
    moved = call(f32(x3, "b", "s", "d"), f32(logits3.transpose(1, 2, 0), "s", "expert", "b"))
    close(moved.array, expected)
    close(call(jnp.asarray(x3), jnp.asarray(logits3)), expected)
    four = call(jnp.asarray(x3)[:, :, None], jnp.asarray(logits3)[:, :, None])
    close(four[:, :, 0], expected)


def test_normalizations(experts, ours, x, logits):
    positive = np.abs(logits)
    for given, router, gating in (
        ("softmax", Router(), logits),
        ("linear", LINEAR_ROUTER, positive),
        (Router(order="before_top_k"), Router(order="before_top_k"), logits),
    ):
        y = moe(ours, jnp.asarray(x), jnp.asarray(gating), experts_per_token=K, normalization=given)
        close(y, expected_of(experts, x, gating, router))


def test_low_precision(experts, ours, x, logits):
    low = f32(x, "s", "d").astype(jnp.bfloat16)
    y = moe(ours, low, f32(logits, "s", "expert"), experts_per_token=K)
    assert y.dtype == jnp.bfloat16
    expected = expected_of(experts, np.asarray(low.array, np.float64), logits)
    np.testing.assert_allclose(np.asarray(y.array, np.float64), expected, atol=0.03)


@pytest.mark.parametrize("algorithm", [*EXACT, "fixed_budget"])
def test_masked_tokens(experts, ours, x, logits, algorithm):
    """They get zeros, whatever they hold, and change nothing for the others."""
    keep = np.arange(TOKENS) % 4 != 1
    expected = expected_of(experts, x, logits) * keep[:, None]
    x[~keep], logits[~keep] = np.nan, np.inf

    def loss(ours, x, gating):
        y, report = mixture_of_experts(
            ours, x, gating, experts_per_token=K, algorithm=algorithm, with_report=True,
            token_mask=tag(jnp.asarray(keep), "s"),
            tokens_per_expert_ratio=ratio_for(algorithm, 10.0),
        )  # fmt: skip
        return (y * y).sum("s").sum("d").array, (y, report)

    arguments = ours, f32(x, "s", "d"), f32(logits, "s", "expert")
    gradients, (y, report) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    close(y.array, expected)
    np.testing.assert_array_equal(y.array[~keep], 0)
    assert [int(v) for v in jax.tree.leaves(report)] == [K * keep.sum(), 0, 0, 0]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_mask_of_several_axes(experts, ours, x, logits):
    keep = (np.arange(TOKENS) % 3 != 0).reshape(2, 4)
    y = moe(
        ours, jnp.asarray(x).reshape(2, 4, HIDDEN), jnp.asarray(logits).reshape(2, 4, EXPERTS),
        experts_per_token=K, token_mask=jnp.asarray(keep),
    )  # fmt: skip
    close(y, expected_of(experts, x, logits).reshape(2, 4, HIDDEN) * keep[:, :, None])


@pytest.mark.parametrize("algorithm", ["auto", *EXACT, "fixed_budget"])
def test_no_tokens(ours, algorithm, record_property):
    record_property("bad_input", "T=0")
    for shape in ((0,), (2, 0)):
        y, report = moe(
            ours, jnp.zeros((*shape, HIDDEN)), jnp.zeros((*shape, EXPERTS)), experts_per_token=K,
            algorithm=algorithm, with_report=True,
            tokens_per_expert_ratio=ratio_for(algorithm, 1.0),
        )  # fmt: skip
        assert y.shape == (*shape, HIDDEN)
        assert [int(v) for v in jax.tree.leaves(report)] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["per_token", "dense", "grouped", "fixed_budget"])
def test_a_named_algorithm_is_the_one_used(monkeypatch, ours, x, logits, name):
    used = []
    for other, function in moe_jax.dispatch.EXACT.items():
        monkeypatch.setitem(
            moe_jax.dispatch.EXACT, other,
            lambda *a, f=function, n=other: (used.append(n), f(*a))[1],
        )  # fmt: skip
    budget = moe_jax.dispatch.fixed_budget
    monkeypatch.setattr(
        moe_jax.dispatch, "fixed_budget", lambda *a: (used.append("fixed_budget"), budget(*a))[1]
    )
    for tokens in (1, TOKENS):
        jax.eval_shape(
            lambda a, b: mixture_of_experts(
                ours, a, b, experts_per_token=K, algorithm=name,
                tokens_per_expert_ratio=ratio_for(name, 1.0),
            ),
            jnp.asarray(x[:tokens]), jnp.asarray(logits[:tokens]),
        )  # fmt: skip
    assert used == [name, name]


def test_auto_follows_choose_algorithm(ours):
    def primitives(tokens, **options):
        jaxpr = jax.make_jaxpr(
            functools.partial(mixture_of_experts, ours, experts_per_token=K, **options)
        )(jnp.zeros((tokens, HIDDEN)), jnp.zeros((tokens, EXPERTS)))
        return str(jaxpr)

    for tokens, ratio in ((1, None), (3, None), (4, None), (64, None), (64, 1.0), (64, 9.0)):
        name = moe_jax.choose_algorithm(tokens, EXPERTS, K, ratio)
        named = {"algorithm": name}
        if name == "fixed_budget":
            named["tokens_per_expert_ratio"] = ratio
        assert primitives(tokens, tokens_per_expert_ratio=ratio) == primitives(tokens, **named)


ARGUMENTS = {
    "x": f32(np.ones((4, HIDDEN)), "s", "d"),
    "gating": f32(np.ones((4, EXPERTS)), "s", "expert"),
    "experts_per_token": K,
}
REFUSED = [
    ({"experts_per_token": 0}, ValueError, "between 1 and the number of experts 6, got 0"),
    ({"experts_per_token": 7}, ValueError, "between 1 and the number of experts 6, got 7"),
    ({"experts_per_token": 2.0}, TypeError, "experts_per_token must be an int, got 2.0"),
    ({"normalization": "tanh"}, ValueError, "normalization must be one of .* got 'tanh'"),
    ({"algorithm": "magic"}, ValueError, "algorithm must be 'auto' or one of .* got 'magic'"),
    ({"algorithm": "fixed_budget"}, ValueError, "needs tokens_per_expert_ratio, got None"),
    ({"tokens_per_expert_ratio": 0.0}, ValueError, "must be a positive number, got 0.0"),
    (
        {"tokens_per_expert_ratio": -1.0, "algorithm": "dense"},
        ValueError,
        "must be a positive number, got -1.0",
    ),
    ({"overflow": "spill"}, ValueError, "overflow must be 'reroute' or 'drop', got 'spill'"),
    ({"x": f32(np.ones((4, 7)), "s", "d")}, ValueError, "axis 'in' has different sizes"),
    ({"x": f32(np.ones((5, HIDDEN)), "s", "d")}, ValueError, "axis 's' has different sizes"),
    ({"x": f32(np.ones((4, HIDDEN)), "s", "in")}, ValueError, "no axis 'd' among {s, in}"),
    ({"x": f32(np.ones(HIDDEN), "d")}, ValueError, "needs a token axis besides 'd'"),
    ({"x": jnp.ones(HIDDEN)}, ValueError, "x needs at least two axes"),
    ({"x": jnp.ones((4, HIDDEN), jnp.int32)}, TypeError, "x must be floats, got int32"),
    (
        {"gating": f32(np.ones((4, 8)), "s", "expert")},
        ValueError,
        "experts.gate holds 6 experts, the gating has 8",
    ),
    ({"gating": f32(np.ones((4, 6)), "s", "e")}, ValueError, r"expected the axes \(s, expert\)"),
    ({"gating": jnp.ones((4, 6, 1))}, ValueError, r"axes \(s, expert\), got shape \(4, 6, 1\)"),
    ({"gating": jnp.ones((4, 6), jnp.int32)}, TypeError, "gating must be floats, got int32"),
    ({"gating": f32(np.ones((4, 0)), "s", "expert")}, ValueError, "number of experts 0"),
    ({"token_mask": jnp.ones(5, bool)}, ValueError, "axis 's' has different sizes"),
    ({"token_mask": jnp.ones((4, 1), bool)}, ValueError, r"axes \(s\), got shape \(4, 1\)"),
    ({"token_mask": jnp.ones(4)}, TypeError, "token_mask must be bool, got float32"),
    ({"selection_bias": jnp.ones(5)}, ValueError, "selection_bias must be {expert=6}, got"),
    ({"selection_bias": jnp.ones((4, 6))}, ValueError, r"shape \(4, 6\) needs 2 tags, got 1"),
    (
        {"normalization": Router(num_groups=6), "experts_per_token": 2},
        ValueError,
        "experts_per_token=2 is more than the 1 experts",
    ),
]


BAD_INPUTS = {"experts_per_token": "K<1, K>E", "tokens_per_expert_ratio": "budget ratio"}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_refuses(ours, change, error, message, record_property):
    name = BAD_INPUTS.get(next(iter(change)), "sizes, names or dtypes")
    record_property("bad_input", "no experts" if "experts 0" in message else name)
    with pytest.raises(error, match=message):
        mixture_of_experts(ours, **{**ARGUMENTS, **change})


@pytest.mark.parametrize("algorithm", ["auto", *EXACT])
def test_fused_experts(rng, experts, ours, x, algorithm, record_property):
    """Ids outside the experts add nothing, even with a bad score; ids named twice add twice."""
    record_property("bad_input", "id < 0 or >= E")
    record_property("bad_input", "duplicate ids in a row")
    ids = rng.integers(0, EXPERTS, (TOKENS, 3))
    scores = rng.normal(size=(TOKENS, 3)).astype(np.float32)
    ids[0] = [2, 2, 2]
    ids[1] = [-1, 4, EXPERTS]
    ids[2] = [-5, 99, 2**31 - 1]
    scores[1, 0], scores[1, 2] = np.nan, np.inf
    known = (ids >= 0) & (ids < EXPERTS)
    expected = combine(x, np.where(known, ids, -1), np.where(known, scores, 0), experts)
    arguments = f32(x, "s", "d"), tag(jnp.asarray(ids), "s", "top_expert")
    y = fused_experts(*arguments, f32(scores, "s", "top_expert"), ours, algorithm=algorithm)
    close(y.array, expected)
    np.testing.assert_array_equal(y.array[2], 0)


def test_fused_experts_takes_bare_arrays_and_a_mask(rng, experts, ours, x):
    ids = rng.integers(0, EXPERTS, (2, 4, 3))
    scores = rng.random((2, 4, 3)).astype(np.float32)
    keep = np.arange(TOKENS).reshape(2, 4) != 3
    y = fused_experts(
        jnp.asarray(x).reshape(2, 4, HIDDEN), jnp.asarray(ids), jnp.asarray(scores), ours,
        token_mask=jnp.asarray(keep),
    )  # fmt: skip
    expected = combine(x, ids.reshape(8, 3), scores.reshape(8, 3), experts)
    close(y, expected.reshape(2, 4, HIDDEN) * keep[:, :, None])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"selected_experts": jnp.ones((4, 2))}, TypeError, "must be integers, got float32"),
        ({"scores": jnp.ones((4, 2), jnp.int32)}, TypeError, "scores must be floats, got int32"),
        ({"scores": jnp.ones((4, 3))}, ValueError, "must have the same sizes"),
        ({"scores": jnp.ones((5, 2))}, ValueError, "axis 's' has different sizes"),
        ({"selected_experts": jnp.ones(4, jnp.int32)}, ValueError, r"expected an array with the"),
        ({"experts": moe_jax.Identity()}, ValueError, "hold no arrays, so that their number"),
        ({"algorithm": "fixed_budget"}, ValueError, "fixed_budget"),
        ({"algorithm": "magic"}, ValueError, "got 'magic'"),
    ],
)
def test_fused_experts_refuses(ours, change, error, message, record_property):
    name = "float ids / int weights" if error is TypeError else "sizes, names or dtypes"
    record_property("bad_input", name)
    arguments = {
        "hidden_states": f32(np.ones((4, HIDDEN)), "s", "d"),
        "selected_experts": jnp.zeros((4, 2), jnp.int32),
        "scores": jnp.ones((4, 2)),
        "experts": ours,
    }
    with pytest.raises(error, match=message):
        fused_experts(**{**arguments, **change})


def test_transposed_weights_go_by_name_where_sizes_agree(rng, record_property):
    """hidden = intermediate: no size can tell a transposed matrix, its names can."""
    record_property("row", "N1")
    record_property("with", "unit tests")
    record_property("trap", "3")
    record_property("bad_input", "D==I weights given transposed")
    experts = TinyExperts.random(rng, EXPERTS, 5, 5)
    layer = experts.ours()
    moved = jax.tree.map(
        lambda w: w.order("in", "out", "expert"), layer, is_leaf=moe_jax.tagged.is_tagged
    )
    x, logits = f32(np.ones((4, 5)), "s", "d"), f32(np.eye(4, EXPERTS), "s", "expert")
    a = moe(layer, x, logits, experts_per_token=K)
    b = moe(moved, x, logits, experts_per_token=K)
    close(a.array, b.array)


@pytest.mark.parametrize("algorithm", EXACT)
def test_numpy_arrays_and_lists_are_taken(ours, x, logits, algorithm):
    expected = moe(
        ours, jnp.asarray(x), jnp.asarray(logits), experts_per_token=K, algorithm=algorithm
    )
    options = {"experts_per_token": K, "algorithm": algorithm}
    mask = [True] * TOKENS
    for kind in (np.asarray, np.ndarray.tolist):
        y = mixture_of_experts(ours, kind(x), kind(logits), token_mask=mask, **options)
        np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("algorithm", EXACT)
def test_integer_weights_are_refused(x, logits, algorithm, record_property):
    record_property("bad_input", "float ids / int weights")
    weights = [tag(jnp.ones((EXPERTS, n, m), jnp.int8), "expert", "out", "in")
               for n, m in ((4, HIDDEN), (HIDDEN, 4))]  # fmt: skip
    with pytest.raises(TypeError, match="floats or packed, got int8"):
        mixture_of_experts(
            moe_jax.MLP(*weights), x, logits, experts_per_token=K, algorithm=algorithm
        )


@pytest.mark.parametrize("algorithm", EXACT)
def test_float64_is_kept(algorithm):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        experts = TinyExperts.random(rng, EXPERTS, HIDDEN)
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), experts.ours())
        x, gating = rng.normal(size=(6, HIDDEN)), np.zeros((6, EXPERTS))
        y = mixture_of_experts(
            wide, jnp.asarray(x), jnp.asarray(gating), experts_per_token=EXPERTS,
            algorithm=algorithm,
        )  # fmt: skip
        assert y.dtype == jnp.float64
        expected = combine(x, *route(gating, EXPERTS, moe_jax.Router()), experts)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)

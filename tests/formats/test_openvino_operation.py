"""OpenVINO's internal operation MOE as data: attributes, inputs, routing weights."""

import dataclasses
import math
import sys

import core_oracle
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import Activation, GptOssMLP, tag
from moe_jax.formats import FormatError, openvino
from moe_jax.formats.openvino import MoeAttributes, MoeOperation, from_experts, from_inputs

E, D, F, K, T = 7, 5, 6, 2, 4
TWO, THREE = "GEMM2_BIAS_SWIGLU_CLAMP", "GEMM3_SWIGLU"
ALPHA_BETA = {"alpha_is_limit": (2.1, 1.3), "alpha_is_slope": (1.3, 2.1)}
FORMS = ("scattered", "compact", "pairs")


def two_parameters(rng, d=D, i=F, dtype=np.float32):
    shapes = (E, d, 2 * i), (E, 1, 2 * i), (E, i, d), (E, 1, d)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def three_parameters(rng, d=D, i=F, dtype=np.float32):
    return tuple(rng.normal(size=s).astype(dtype) for s in ((E, d, i), (E, d, i), (E, i, d)))


def two(rng, order="alpha_is_limit", gate_idx=0):
    attributes = MoeAttributes(TWO, order, *ALPHA_BETA[order], gate_idx=gate_idx)
    return MoeOperation(attributes, two_parameters(rng))


def three(rng, activation_type="swiglu"):
    attributes = MoeAttributes(THREE, "alpha_is_limit", activation_type=activation_type)
    return MoeOperation(attributes, three_parameters(rng))


def calls(rng, lead=(T,)):
    x = rng.normal(size=(*lead, D)).astype(np.float32)
    ids = rng.permuted(np.broadcast_to(np.arange(E), (*lead, E)), axis=-1)[..., :K]
    return x, ids, rng.normal(size=ids.shape).astype(np.float32)


def formula(operation, x, ids, weights):
    """The operation's pseudo-code, all experts on all tokens, in float64."""
    a, p = operation.attributes, [w.astype(np.float64) for w in operation.parameters]
    limit, slope = a.expert_alpha, a.expert_beta
    if a.order == "alpha_is_slope":
        limit, slope = slope, limit
    rows = x.reshape(-1, D).astype(np.float64)
    first = np.einsum("ti,eio->eto", rows, p[0])
    if a.expert_type == TWO:
        both = first + p[1]
        gate = np.minimum(both[..., a.gate_idx :: 2], limit)
        up = np.clip(both[..., 1 - a.gate_idx :: 2], -limit, limit)
        y = np.einsum("eti,eio->eto", (up + 1) * gate * core_oracle.sigmoid(slope * gate), p[2])
        y = y + p[3]
    else:
        act = {
            "swiglu": lambda g: g * core_oracle.sigmoid(1.0 * g),
            "geglu_erf": core_oracle.gelu,
            "geglu_tanh": core_oracle.gelu_tanh,
        }[a.activation_type]
        y = np.einsum("eti,eio->eto", act(first) * np.einsum("ti,eio->eto", rows, p[1]), p[2])
    by_expert = np.zeros((len(rows), len(y)))
    for t, e in np.ndindex(ids.reshape(-1, K).shape):
        by_expert[t, ids.reshape(-1, K)[t, e]] += weights.reshape(-1, K)[t, e]
    return np.einsum("te,eto->to", by_expert, y).reshape(x.shape)


@pytest.mark.parametrize("order", ALPHA_BETA)
@pytest.mark.parametrize("gate_idx", [0, 1])
def test_two_matrices_compute_the_formula(rng, record_property, order, gate_idx):
    record_property("trap", "1" if gate_idx == 0 else "2")
    operation, (x, ids, weights) = two(rng, order, gate_idx), calls(rng)
    y = operation(jnp.asarray(x), weights, ids, form="pairs")
    error = np.abs(np.asarray(y) - formula(operation, x, ids, weights)).max()
    record_property("error", float(error))
    assert error <= 1.5e-5


@pytest.mark.parametrize("activation_type", ["swiglu", "geglu_erf", "geglu_tanh"])
def test_three_matrices_compute_the_formula(rng, activation_type):
    operation, (x, ids, weights) = three(rng, activation_type), calls(rng)
    y = np.asarray(operation(jnp.asarray(x), weights, ids, form="pairs"))
    np.testing.assert_allclose(y, formula(operation, x, ids, weights), rtol=2e-5, atol=2e-5)


def test_the_two_orders_say_the_same_with_names_exchanged(rng, record_property):
    record_property("trap", "1")
    one, other = two(rng), two(rng, "alpha_is_slope")
    assert (one.attributes.limit, one.attributes.slope) == (2.1, 1.3)
    assert (other.attributes.limit, other.attributes.slope) == (2.1, 1.3)
    for order in ALPHA_BETA:
        attributes = from_experts(two(rng).experts(), order=order).attributes
        assert attributes == MoeAttributes(TWO, order, *ALPHA_BETA[order])


def test_defaults_are_those_of_the_revision():
    for order in ALPHA_BETA:
        attributes = MoeAttributes(THREE, order)
        assert (attributes.limit, attributes.slope) == (0.0, 1.0)
        with pytest.raises(FormatError, match="clamp .* must be positive"):
            MoeAttributes(TWO, order).activation  # noqa: B018


@pytest.mark.parametrize(
    ("order", "pair"), [("alpha_is_limit", (1.702, 7.0)), ("alpha_is_slope", (7.0, 1.702))]
)
def test_exchanged_attributes_are_noticed(rng, record_property, order, pair):
    record_property("bad_input", "OV alpha/beta looking swapped")
    operation = MoeOperation(MoeAttributes(TWO, order, *pair), two_parameters(rng))
    with pytest.warns(UserWarning, match="look exchanged"):
        operation.experts()
    right = MoeAttributes(TWO, order, *pair[::-1])
    assert right.activation == moe_jax.GPT_OSS_ACTIVATION
    defaults_of_the_other = (1.0, 0.0) if order == "alpha_is_limit" else (0.0, 1.0)
    three_matrices = MoeAttributes(THREE, order, *defaults_of_the_other)
    with pytest.warns(UserWarning, match="look exchanged"):
        three_matrices.activation  # noqa: B018


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_round_trips_keep_every_bit(rng, dtype):
    for order in ALPHA_BETA:
        for gate_idx in (0, 1):
            attributes = MoeAttributes(TWO, order, *ALPHA_BETA[order], gate_idx=gate_idx)
            assert_same_operation(MoeOperation(attributes, two_parameters(rng, dtype=dtype)))
        for activation_type in ("swiglu", "geglu_erf", "geglu_tanh"):
            pair = (0.0, 1.0) if order == "alpha_is_limit" else (1.0, 0.0)
            attributes = MoeAttributes(THREE, order, *pair, activation_type=activation_type)
            assert_same_operation(MoeOperation(attributes, three_parameters(rng, dtype=dtype)))


def assert_same_operation(operation):
    experts = operation.experts()
    again = from_experts(experts, order=operation.attributes.order)
    assert again.attributes == operation.attributes
    for one, other in zip(operation.parameters, again.parameters, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(core_oracle.bits(one), core_oracle.bits(other))


def test_experts_come_back_bit_for_bit(rng):
    experts = two(rng).experts()
    core_oracle.assert_same(from_experts(experts, order="alpha_is_limit").experts(), experts)


def test_orientation_is_the_formats_even_where_sizes_agree(rng, record_property):
    record_property("trap", "3")
    record_property("bad_input", "D==I weights given transposed")
    attributes = MoeAttributes(THREE, "alpha_is_limit")
    operation = MoeOperation(attributes, three_parameters(rng, d=D, i=D))
    x, ids, weights = calls(rng)
    y = np.asarray(operation(jnp.asarray(x), weights, ids, form="pairs"))
    np.testing.assert_allclose(y, formula(operation, x, ids, weights), rtol=2e-5, atol=2e-5)
    gate = operation.experts().gate
    np.testing.assert_array_equal(gate.untag("expert", "in", "out"), operation.parameters[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(T,), (2, T // 2)])
def test_routing_weights_of_all_forms_mean_the_same(rng, form, lead):
    operation, (x, ids, weights) = two(rng), calls(rng, lead)
    stored, indices = openvino.to_openvino_routing(ids, weights, E, form=form)
    tokens = math.prod(lead)
    shapes = {"scattered": (E, *lead, 1), "compact": (K, tokens, 1), "pairs": (*lead, K)}
    assert stored.shape == shapes[form]
    again = openvino.from_openvino_routing(stored, indices, E, form=form, token_shape=lead)
    np.testing.assert_array_equal(again[0], ids)
    np.testing.assert_array_equal(again[1], weights)
    y = operation(jnp.asarray(x), stored, indices, form=form)
    assert np.abs(np.asarray(y) - formula(operation, x, ids, weights)).max() <= 1.5e-5


def test_an_expert_named_twice_counts_twice(rng, record_property):
    record_property("bad_input", "duplicate ids")
    operation, (x, ids, weights) = two(rng), calls(rng)
    ids[0] = ids[0, 0]
    for form in FORMS:
        stored = openvino.to_openvino_routing(ids, weights, E, form=form)
        y = np.asarray(operation(jnp.asarray(x), *stored, form=form))
        assert np.abs(y - formula(operation, x, ids, weights)).max() <= 1.5e-5


def test_no_tokens(rng, record_property):
    record_property("bad_input", "T=0")
    x, ids, weights = calls(rng, (0,))
    for form in FORMS:
        stored = openvino.to_openvino_routing(ids, weights, E, form=form)
        assert two(rng)(jnp.asarray(x), *stored, form=form).shape == (0, D)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_type": "GEMM4"}, "expert_type must be one of"),
        ({"order": "beta_is_limit"}, "order must be one of"),
        ({"gate_idx": 2}, "gate_idx must be one of"),
        ({"activation_type": "relu"}, "activation_type must be one of"),
        ({"activation_type": "geglu_erf"}, "activation_type='geglu_erf' needs GEMM3_SWIGLU"),
        ({"expert_type": THREE, "gate_idx": 1}, "gate_idx=1 is for GEMM2"),
    ],
)
def test_attributes_that_do_not_exist_are_refused(record_property, fields, message):
    record_property("bad_input", "unknown activation")
    with pytest.raises(FormatError, match=message):
        MoeAttributes(**{"expert_type": TWO, "order": "alpha_is_limit", **fields})


def test_the_number_of_inputs_is_seven_or_six(rng):
    attributes = MoeAttributes(TWO, "alpha_is_limit", 7.0, 1.702)
    first = (None, None, None)
    assert len(from_inputs(attributes, (*first, *two_parameters(rng))).parameters) == 4
    with pytest.raises(FormatError, match="has 7 inputs: hidden_states, .* got 3"):
        from_inputs(attributes, (*first, *three_parameters(rng)))
    with pytest.raises(FormatError, match="has 6 inputs"):
        from_inputs(MoeAttributes(THREE, "alpha_is_limit"), (*first, *two_parameters(rng)))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda w: w[:, :, 1:], "weight_0 must have an even width"),
        (0, lambda w: w[0], "weight_0 must be .experts, in, out"),
        (0, lambda w: w[:0], "weight_0 holds no experts"),
        (1, lambda w: w[:, 0], "bias_0 must be"),
        (1, lambda w: w[1:], "bias_0 must be"),
        (2, lambda w: w[1:], "weight_1 must be"),
        (2, lambda w: w.swapaxes(1, 2), "weight_1 must be"),
        (3, lambda w: w[..., 1:], "bias_1 must be"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(rng, record_property, index, change, message):
    record_property("bad_input", "E or sizes differ among weights and biases")
    parameters = list(two_parameters(rng))
    parameters[index] = change(parameters[index])
    with pytest.raises(FormatError, match=message):
        MoeOperation(MoeAttributes(TWO, "alpha_is_limit", 7.0, 1.702), tuple(parameters))


@pytest.mark.parametrize("dtype", [np.float16, np.int32])
def test_inputs_of_several_dtypes_are_refused(rng, dtype):
    gate, up, down = three_parameters(rng)
    with pytest.raises(TypeError, match="floats of one dtype"):
        MoeOperation(MoeAttributes(THREE, "alpha_is_limit"), (gate, up.astype(dtype), down))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, i, w: (x[:, 1:], i, w), FormatError, "hidden_states must be"),
        (lambda x, i, w: (x.astype(jnp.float16), i, w), TypeError, "hidden_states must be float32"),
        (lambda x, i, w: (x, i[1:], w), FormatError, "indices must be"),
        (lambda x, i, w: (x, i, w[:, 1:]), FormatError, "routing_weights of the form 'pairs'"),
        (lambda x, i, w: (x, i.astype(np.float32), w), TypeError, "indices must be int32 or int64"),
        (lambda x, i, w: (x, i, w.astype(np.int32)), TypeError, "routing_weights must be floats"),
        (lambda x, i, w: (x, np.where(i == i[1, 1], E, i), w), FormatError, "index 7 at"),
        (lambda x, i, w: (x, np.where(i == i[1, 1], -1, i), w), FormatError, "index -1 at"),
    ],
)
def test_calls_that_do_not_fit_are_refused(rng, record_property, change, error, message):
    record_property("bad_input", "routing shape, dtype or range")
    x, ids, weights = change(*calls(rng))
    with pytest.raises(error, match=message):
        two(rng)(jnp.asarray(x), weights, ids, form="pairs")


def test_routing_weights_that_do_not_fit_are_refused(rng):
    _, ids, weights = calls(rng)
    with pytest.raises(FormatError, match="form of routing weights must be one of"):
        openvino.to_openvino_routing(ids, weights, E, form="dense")
    with pytest.raises(FormatError, match=r"must both be \[..., topk\]"):
        openvino.to_openvino_routing(ids, weights[1:], E, form="pairs")
    with pytest.raises(FormatError, match="index 6 at"):
        openvino.to_openvino_routing(np.where(ids == ids[0, 0], 6, ids), weights, 6, form="compact")
    scattered, _ = openvino.to_openvino_routing(ids, weights, E, form="scattered")
    absent = next(e for e in range(E) if e not in ids[2])
    scattered[absent, 2] = 0.5
    with pytest.raises(FormatError, match=f"token 2 a weight for expert {absent}"):
        openvino.from_openvino_routing(scattered, ids, E, form="scattered", token_shape=(T,))


def clamped(**fields):
    return dataclasses.replace(moe_jax.GPT_OSS_ACTIVATION, **fields)


@pytest.mark.parametrize(
    ("activation", "field"),
    [
        (clamped(beta=0.0), r"activation.beta=0.0"),
        (clamped(limit=None), r"activation.limit=None"),
        (clamped(limit=math.inf), r"activation.limit=inf"),
        (Activation("geglu", beta=1.0, limit=7.0, layout="interleaved"), "activation.kind='geglu'"),
    ],
)
def test_two_matrices_refuse_what_they_cannot_say(rng, record_property, activation, field):
    record_property("bad_input", "export asked of a thing the target op cannot say")
    experts = dataclasses.replace(two(rng).experts(), activation=activation)
    with pytest.raises(FormatError, match=field):
        from_experts(experts, order="alpha_is_limit")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"activation": Activation("reglu")}, "activation.kind='reglu'"),
        ({"activation": Activation("swiglu", beta=1.0)}, "activation.beta=1.0"),
        ({"activation": Activation("swiglu", limit=7.0)}, "activation.limit=7.0"),
        ({"up_bias": tag(jnp.zeros((E, F)), "expert", "out")}, "up_bias is given"),
    ],
)
def test_three_matrices_refuse_what_they_cannot_say(rng, record_property, changes, field):
    record_property("bad_input", "biases partly given")
    experts = dataclasses.replace(three(rng).experts(), **changes)
    with pytest.raises(FormatError, match=field):
        from_experts(experts, order="alpha_is_limit")


def test_weights_that_cannot_be_stored_are_refused(rng):
    experts = three(rng).experts()
    packed = core_oracle.random_mxfp4(rng, E, 6, 1)[0]
    for changes, message in (
        ({"up": packed}, "up is BlockScaled.* dequantize"),
        ({"up": experts.up.astype(jnp.float16)}, "must have one dtype"),
        ({"up": experts.up.astype(jnp.int32)}, "up is int32: expected float32"),
    ):
        with pytest.raises(FormatError, match=message):
            from_experts(dataclasses.replace(experts, **changes), order="alpha_is_limit")
    with pytest.raises(FormatError, match="experts=Identity"):
        from_experts(moe_jax.Identity(), order="alpha_is_limit")
    odd = GptOssMLP(
        *(tag(jnp.zeros((E, 3, *s)), *a) for s, a in (((D,), ("expert", "out", "in")),)),
        tag(jnp.zeros((E, 3)), "expert", "out"),
        tag(jnp.zeros((E, D, 1)), "expert", "out", "in"),
        tag(jnp.zeros((E, D)), "expert", "out"),
        clamped(layout="concatenated"),
    )
    with pytest.raises(FormatError, match="gate_up must have an even number of rows"):
        from_experts(odd, order="alpha_is_limit")


def test_without_the_package_files_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for call in (lambda p: openvino.write(p, {}), openvino.read):
        with pytest.raises(ImportError, match=r"pip install moe-jax\[openvino\]"):
            call(tmp_path / "layer.xml")

"""Experts in standard operators: each on every token.

Weights are [expert, in, out], biases [expert, out], in their own dtype; they are cast to that of
the tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.experts.layers import MLP, GatedMLP, GptOssMLP, Identity
from moe_jax.experts.t5 import T5FeedForward
from moe_jax.formats.arrays import FLOATS, IN_OUT, check_all_or_none, numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.activation_nodes import add_activation, add_combine
from moe_jax.formats.onnx.graph import finite_cast
from moe_jax.formats.onnx.norm_nodes import add_norm
from moe_jax.formats.onnx.writer import Writer

_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix of an expert and its bias, by the fields that hold them.

    Attributes:
        weight: {expert, out, in}.
        bias: {expert, out}, and the field may be None; None where there is no such field.
    """

    weight: str
    bias: str | None = None


@dataclasses.dataclass(frozen=True)
class ExpertFields:
    """What the fields of a class of experts are.

    Attributes:
        lanes: the matrices that rows are multiplied with: one, or a gate and a linear lane.
        down: the matrix behind the activation; None for experts that return their rows.
        norm: the fields of the weight and bias {expert, d} of a norm before the lanes; in experts
            that have one, rows are added to the result.
    """

    lanes: tuple[Linear, ...] = ()
    down: Linear | None = None
    norm: tuple[str, str] | None = None

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """All matrices, in order."""
        return self.lanes if self.down is None else (*self.lanes, self.down)


_DOWN = Linear("down", "down_bias")

EXPERTS: Mapping[type, ExpertFields] = {
    Identity: ExpertFields(),
    MLP: ExpertFields((Linear("up", "up_bias"),), _DOWN),
    GptOssMLP: ExpertFields((Linear("gate_up", "gate_up_bias"),), _DOWN),
    GatedMLP: ExpertFields((Linear("gate", "gate_bias"), Linear("up", "up_bias")), _DOWN),
    T5FeedForward: ExpertFields(
        (Linear("wi_0"), Linear("wi_1")), Linear("wo"), ("norm_weight", "norm_bias")
    ),
}
"""The experts that can be written."""


def fields_of(experts: Any) -> ExpertFields:
    """The fields of experts. Raises FormatError where their class is not known."""
    if type(experts) not in EXPERTS:
        known = ", ".join(kind.__name__ for kind in EXPERTS)
        raise FormatError(f"the experts are {type(experts).__name__}: those known are {known}")
    return EXPERTS[type(experts)]


def add_experts(
    writer: Writer, experts: Any, rows: str, sizes: Mapping[str, int], name: str
) -> str:
    """What every expert makes of every row.

    Args:
        writer: the graph.
        experts: one of `EXPERTS`.
        rows: the name of the tokens [T, D].
        sizes: of the axes `expert` and `d`.
        name: constants are `NAME.experts.FIELD`.

    Returns:
        The name of [E, T, D], or [1, T, D] where all experts do the same.

    Raises:
        FormatError: an array cannot be said, is beyond the writer's dtype, or does not fit the
            others.
    """
    fields = fields_of(experts)
    constants = _constants(writer, experts, fields, sizes, name)
    rows = writer.op("Unsqueeze", rows, writer.integers(0))
    if fields.down is None:
        return rows
    x = rows
    if fields.norm is not None:
        weight, bias = (constants.get(field) for field in fields.norm)
        assert weight is not None  # only the bias may be absent
        x = add_norm(writer, experts.norm, writer.cast(x, writer.dtype, _FLOAT32), weight, bias)
        x = writer.cast(x, _FLOAT32, writer.dtype)
    else:
        # not left to the MatMul: OpenVINO does not broadcast where the number of tokens is unknown
        x = writer.op("Tile", x, writer.integers(sizes["expert"], 1, 1))
    lanes = [_linear(writer, x, part, constants) for part in fields.lanes]
    if len(lanes) == 2:
        hidden = add_combine(writer, experts.activation, *lanes)
    else:
        hidden = add_activation(writer, experts.activation, lanes[0])
    y = _linear(writer, hidden, fields.down, constants)
    return y if fields.norm is None else writer.op("Add", rows, y)


def _linear(writer: Writer, x: str, part: Linear, constants: Mapping[str, str]) -> str:
    y = writer.op("MatMul", x, constants[part.weight])
    if part.bias is None or part.bias not in constants:
        return y
    return writer.op("Add", y, constants[part.bias])


def _constants(
    writer: Writer, experts: Any, fields: ExpertFields, sizes: Mapping[str, int], name: str
) -> dict[str, str]:
    """The experts' arrays by field, those that are given.

    Weights are of the writer's dtype, norms are float32; vectors have an axis for tokens.
    """
    arrays = _arrays(experts, fields, sizes)
    result = {}
    for field, array in arrays.items():
        dtype = _FLOAT32 if fields.norm and field in fields.norm else writer.dtype
        finite_cast(field, array, dtype)  # which the graph does
        constant = writer.constant(f"{name}.experts.{field}", array)
        constant = writer.cast(constant, array.dtype, dtype)
        if array.ndim == 2:
            constant = writer.op("Unsqueeze", constant, writer.integers(1))
        result[field] = constant
    return result


def _arrays(experts: Any, fields: ExpertFields, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The experts' arrays by field, after a check that they fit each other."""
    biases = [part.bias for part in fields.matrices if part.bias is not None]
    check_all_or_none({bias: getattr(experts, bias) for bias in biases})
    count, hidden = {"expert": sizes["expert"]}, sizes["d"]
    arrays: dict[str, np.ndarray] = {}

    def add(field: str, axes: tuple[str, ...], expected: dict[str, int]) -> np.ndarray:
        value = getattr(experts, field)
        arrays[field] = numpy_of(field, value, axes, sizes=count | expected, dtypes=FLOATS)
        return arrays[field]

    inner: dict[str, int] = {}
    for part in fields.matrices:
        is_down = part is fields.down
        expected = {**inner, "out": hidden} if is_down else {"in": hidden}
        outputs = add(part.weight, IN_OUT, expected).shape[2]
        if not is_down:
            inner = {"in": _width(part, experts, fields, inner, outputs)}
        if part.bias is not None and getattr(experts, part.bias) is not None:
            add(part.bias, ("expert", "out"), {"out": outputs})
    for field in fields.norm or ():
        if getattr(experts, field) is not None:
            add(field, ("expert", "d"), {"d": hidden})
    return arrays


def _width(
    part: Linear, experts: Any, fields: ExpertFields, inner: Mapping[str, int], outputs: int
) -> int:
    """The intermediate size that a lane with so many outputs leads to."""
    activation = experts.activation
    if len(fields.lanes) == 2 and not activation.gated:
        raise FormatError(f"activation={activation}: {type(experts).__name__} needs a gated kind")
    lanes = 2 if activation.gated and len(fields.lanes) == 1 else 1
    width = outputs // lanes
    if outputs % lanes or inner.get("in", width) != width:
        raise FormatError(
            f"{part.weight} has {outputs} outputs, which do not fit {activation.kind!r} and the "
            f"other matrices"
        )
    return width

"""A graph in the making: nodes are added in the order of execution and named as they come.

writer = Writer(np.dtype("float32"))
x = writer.input("x", ("tokens", 8))
writer.output(writer.op("Relu", x), "y", ("tokens", 8))
model = writer.model()
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx import graph

METADATA_KEY = "moe_jax.layers"
"""The entry of a model's metadata under which notes on its layers are kept, as JSON."""


@dataclasses.dataclass
class Writer:
    """Nodes, constants, inputs and outputs of a graph.

    Attributes:
        dtype: of the activations that flow through the graph, and of `number`.
        nodes: in the order of execution.
        constants: initialisers by name.
        inputs: inputs of the graph.
        outputs: outputs of the graph.
        notes: what `note` was told, by layer.
        opsets: version of each domain besides the standard one.
    """

    dtype: np.dtype
    nodes: list[NodeProto] = dataclasses.field(default_factory=list)
    constants: dict[str, TensorProto] = dataclasses.field(default_factory=dict)
    inputs: list[ValueInfoProto] = dataclasses.field(default_factory=list)
    outputs: list[ValueInfoProto] = dataclasses.field(default_factory=list)
    notes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    opsets: dict[str, int] = dataclasses.field(default_factory=dict)
    _scope: str = ""
    _count: int = 0

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.dtype)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of nodes within begin with `name`, and are counted from 0."""
        outer = self._scope, self._count
        self._scope, self._count = f"{name}/", 0
        try:
            yield
        finally:
            self._scope, self._count = outer

    def input(
        self, name: str, shape: Sequence[graph.Dimension], dtype: np.dtype | None = None
    ) -> str:
        """An input of the graph; unless stated, of the activations' dtype. Returns its name."""
        self.inputs.append(graph.value(name, dtype or self.dtype, shape))
        return name

    def output(
        self,
        result: str,
        name: str,
        shape: Sequence[graph.Dimension],
        dtype: np.dtype | None = None,
    ) -> None:
        """Gives a result to the caller under a name."""
        self.nodes.append(graph.node("Identity", [result], [name], name=f"output {name}"))
        self.outputs.append(graph.value(name, dtype or self.dtype, shape))

    def constant(self, name: str, array: Any) -> str:
        """A named constant. Raises FormatError where the name is taken by another."""
        tensor = graph.initialiser(name, array)
        if self.constants.setdefault(name, tensor) != tensor:
            raise FormatError(f"two constants are named {name!r}: give the layers other names")
        return name

    def number(self, number: float) -> str:
        """A scalar of the activations' dtype. Raises FormatError where it is beyond that."""
        array = graph.finite_cast(repr(number), np.asarray(number, np.float64), self.dtype)
        return self.constant(f"{float(number)!r}:{self.dtype}", array)

    def integers(self, *values: int) -> str:
        """A list of int64."""
        return self.constant(f"{list(values)}", np.asarray(values, np.int64))

    def op(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        return self.ops(operator, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, operator: str, count: int, *inputs: str, domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with `count` outputs."""
        name = f"{self._scope}{operator}_{self._count}"
        self._count += 1
        outputs = [name] if count == 1 else [f"{name}:{i}" for i in range(count)]
        self.nodes.append(
            graph.node(operator, inputs, outputs, domain=domain, name=name, **attributes)
        )
        return outputs

    def cast(self, x: str, source: Any, target: Any) -> str:
        """`x` of dtype `source` as `target`; no node where they are the same."""
        if np.dtype(source) == np.dtype(target):
            return x
        return self.op("Cast", x, to=graph.data_type(target))

    def reshape_like(self, x: str, like: str) -> str:
        """`x` in the shape of `like`, which may be empty."""
        return self.op("Reshape", x, self.op("Shape", like), allowzero=1)

    def note(self, layer: str, **what: Any) -> None:
        """Keeps what a reader needs to know of a layer besides its nodes."""
        if layer in self.notes:
            raise FormatError(f"two layers are named {layer!r}: give them other names")
        self.notes[layer] = what

    def model(self, functions: Sequence[FunctionProto] = ()) -> ModelProto:
        """The model, checked. Raises FormatError where onnx does not accept it.

        Args:
            functions: definitions of operators in terms of others, for runtimes without them.
        """
        model = graph.model_of(
            self.nodes, self.inputs, self.outputs, list(self.constants.values()), self.opsets
        )
        if self.notes:
            entry = model.metadata_props.add()
            entry.key, entry.value = METADATA_KEY, json.dumps(self.notes)
        model.functions.extend(functions)
        return graph.check(model)


def read_notes(model: ModelProto) -> Mapping[str, dict[str, Any]]:
    """The notes on a model's layers, empty where it has none.

    Raises:
        FormatError: they are not what a `Writer` writes.
    """
    for entry in model.metadata_props:
        if entry.key != METADATA_KEY:
            continue
        try:
            notes = json.loads(entry.value)
        except ValueError as error:
            raise FormatError(f"the metadata {METADATA_KEY} is not JSON: {error}") from error
        if not isinstance(notes, dict) or not all(isinstance(n, dict) for n in notes.values()):
            raise FormatError(f"the metadata {METADATA_KEY} must map layers to objects")
        return notes
    return {}

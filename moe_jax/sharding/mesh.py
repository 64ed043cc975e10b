"""Meshes of devices, and the rules by which arrays lie on them.

A mesh has three axes:

    data      holds everything once more for each of its devices, and splits the batch
    expert    splits experts, and the batch further, outside of the experts
    model     splits experts further, and what a model wants split besides, such as attention heads

One table says which mesh axes split which axis tag. All arrays of an expert follow it: floats,
biases, and the parts of packed weights, whose own axes derive from the logical ones.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.quantization.packed import is_packed
from moe_jax.rules import (
    FrozenRules,
    Rules,
    check_divisible,
    check_on_mesh,
    divisors,
    listed,
    mesh_axes,
)
from moe_jax.sharding.communication import COMMUNICATIONS, CommunicationChoice
from moe_jax.tagged import Tagged, is_tagged, tag

SHARDING_RULES: Rules = FrozenRules({"b": ("data", "expert"), "expert": ("expert", "model")})
"""Axis tag -> mesh axes that split it; every other axis is whole on every device.

These are the layer's. A model adds those of its own axes: `{**SHARDING_RULES, "voc": "model"}`.
"""


def make_mesh(
    *,
    data: int = 1,
    expert: int | None = None,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `expert` and `model`, all of them `AxisType.Auto`.

    Args:
        data: size of the axis.
        expert: size of the axis; None for as many as there are devices for.
        model: size of the axis.
        devices: what it is made of; None for all of `jax.devices()`. Where all sizes are given, the
            first so many of them are taken.

    Raises:
        ValueError: a size is below 1, or there are not as many devices as the sizes say.
    """
    given = {"data": data, "expert": expert, "model": model}
    for axis, size in given.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"mesh axis {axis!r} must have a size of at least 1, got {size!r}")
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    if expert is None:
        if count % (data * model):
            axis = "data" if count % data else "model"
            choices = divisors(count if axis == "data" else count // data)
            raise ValueError(
                f"mesh axis {axis!r} of size {given[axis]} does not divide {count} devices"
                f"{'' if axis == 'data' else f' in {data} parts'}: "
                f"sizes that would do are {listed(choices)}"
            )
        expert = count // (data * model)
    needed = data * expert * model
    if needed > count:
        sizes = {"data": data, "expert": expert, "model": model}
        axis = max(sizes, key=lambda name: sizes[name])
        most = count // (needed // sizes[axis])
        advice = f"at most {most} would do" if most else "make another axis smaller as well"
        raise ValueError(
            f"a mesh of data={data}, expert={expert}, model={model} needs {needed} devices, there "
            f"are {count}: for axis {axis!r} {advice}"
        )
    return jax.make_mesh(
        (data, expert, model),
        ("data", "expert", "model"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices[:needed],
    )


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a layer or a model is spread over devices.

    Attributes:
        mesh: the devices; its axes are `AxisType.Auto`, as `make_mesh` makes them.
        rules: axis tag -> mesh axis, or several, or None; a copy is kept. `expert` says which axes
            split experts. Those of `b` that are not among them split the tokens that meet the same
            experts.
        communication: how rows meet the experts of other devices, see `choose_communication`;
            `auto` chooses by the number of tokens.
    """

    mesh: Mesh
    rules: Rules = SHARDING_RULES
    communication: CommunicationChoice = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {self.mesh!r}")
        object.__setattr__(self, "rules", FrozenRules.of(self.rules))
        for axis, kind in zip(self.mesh.axis_names, self.mesh.axis_types, strict=True):
            if kind != AxisType.Auto:
                raise ValueError(
                    f"mesh axis {axis!r} is {kind}: make the mesh with moe_jax.make_mesh, or with "
                    f"axis_types=(jax.sharding.AxisType.Auto, ...)"
                )
        for axis in self.rules:
            check_on_mesh(axis, self.mesh, self.rules)
        if self.communication not in ("auto", *COMMUNICATIONS):
            raise ValueError(
                f"communication must be 'auto' or one of {COMMUNICATIONS}, "
                f"got {self.communication!r}"
            )

    def axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that split the arrays' axis of that tag."""
        return mesh_axes(self.rules, axis)

    def count(self, *axes: str) -> int:
        """How many devices some mesh axes have together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def of(self, tree: Any) -> Any:
        """The same pytree with a `NamedSharding` for each array.

        For `jax.jit`'s `in_shardings` and `out_shardings`, for `jax.device_put`, or to restore a
        checkpoint. Arrays may be abstract. A bare array counts as one with the `expert` axis in
        front, as among experts.

        Raises:
            ValueError: an axis cannot be split evenly; says which, and what would do.
        """
        return jax.tree.map_with_path(
            self._of, tree, is_leaf=lambda node: is_tagged(node) or is_packed(node)
        )

    def place[T](self, tree: T) -> T:
        """Puts every array where `of` says."""
        return jax.device_put(tree, self.of(tree))

    def constrain(self, x: Tagged) -> Tagged:
        """Says inside `jax.jit` that a value lies as `spec` says."""
        sharding = NamedSharding(self.mesh, self.spec(x))
        return x.map(lambda array: jax.lax.with_sharding_constraint(array, sharding))

    def spec(self, x: Tagged) -> PartitionSpec:
        """Which mesh axes split which axes of a value inside of a program, whatever its sizes.

        Of the mesh axes of a rule the first ones are used, as many as split the axis evenly: a
        batch of one is whole on every device. A mesh axis splits one axis of the array, the last
        that has a rule for it: the vocabulary rather than the batch.
        """
        entries, used = [], set()
        for axis, size in reversed(x.sizes.items()):
            names = tuple(name for name in self.axes(axis) if name not in used)
            while size % self.count(*names):
                names = names[:-1]
            used.update(names)
            entries.append(names or None)
        return PartitionSpec(*reversed(entries))

    def _of(self, path: Any, node: Any) -> Any:
        if is_packed(node):
            node.check()
            parts = dataclasses.replace(self, rules=node.rules_for_leaves(self.rules))
            return jax.tree.map_with_path(
                lambda end, leaf: parts._of((*path, *end), leaf), node, is_leaf=is_tagged
            )
        if is_tagged(node):
            return dataclasses.replace(node, array=self._leaf(path, node))
        axes = ("expert", *(f"axis_{n}" for n in range(1, len(node.shape))))
        return self._leaf(path, tag(node, *axes))

    def _leaf(self, path: Any, leaf: Tagged) -> NamedSharding:
        for axis, size in leaf.sizes.items():
            check_divisible(
                f"{jax.tree_util.keystr(path)} {leaf}".strip(), axis, size, self.mesh, self.rules
            )
        return NamedSharding(self.mesh, leaf.spec(self.rules))

"""Rules: which mesh axes split which axis tag, and whether they can."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from jax.sharding import Mesh

type Rules = Mapping[str, str | tuple[str, ...] | None]

_MOST_LISTED = 12


class FrozenRules(Mapping[str, str | tuple[str, ...] | None]):
    """A mapping from axis tags to mesh axes: hashable, and equal to any mapping that says the same.

    A program is compiled for rules as they are then. So what a `Sharding` keeps is a copy that
    cannot change, and counts in comparisons and hashes. It can be pickled and copied.
    """

    __slots__ = ("_targets",)

    def __init__(self, rules: Rules) -> None:
        """Copies `rules`.

        Raises:
            TypeError: they are no mapping from names to a name, a tuple of names or None.
        """
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules must map axis tags to mesh axes, got {rules!r}")
        self._targets = {axis: _checked(axis, target) for axis, target in rules.items()}

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """`rules`, frozen if they are not."""
        return rules if isinstance(rules, cls) else cls(rules)

    def __getitem__(self, axis: str) -> str | tuple[str, ...] | None:
        return self._targets[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __hash__(self) -> int:
        return hash(frozenset(self._targets.items()))

    def __repr__(self) -> str:
        return repr(self._targets)


def _checked(axis: str, target: object) -> str | tuple[str, ...] | None:
    if target is None or isinstance(target, str):
        return target
    if isinstance(target, tuple | list) and all(isinstance(name, str) for name in target):
        return tuple(target)
    raise TypeError(
        f"the rule of axis {axis!r} must be a mesh axis, a tuple of them or None, got {target!r}"
    )


def mesh_axes(rules: Rules, axis: str) -> tuple[str, ...]:
    """The mesh axes that rules give an axis tag."""
    target = rules.get(axis)
    return (target,) if isinstance(target, str) else target or ()


def check_on_mesh(axis: str, mesh: Mesh, rules: Rules) -> None:
    """Raises ValueError where the rule of an axis names what is no axis of the mesh."""
    for name in mesh_axes(rules, axis):
        if name not in mesh.shape:
            raise ValueError(
                f"the rules send axis {axis!r} to mesh axis {name!r}, the mesh has "
                f"{tuple(mesh.shape)}: make it with moe_jax.make_mesh, or give other rules"
            )


def check_divisible(what: str, axis: str, size: int, mesh: Mesh, rules: Rules) -> None:
    """Raises ValueError where `rules` split an axis of `size` unevenly; `what` names the array."""
    check_on_mesh(axis, mesh, rules)
    names = mesh_axes(rules, axis)
    shards = math.prod(mesh.shape[name] for name in names)
    if size % shards == 0:
        return
    sizes = ", ".join(f"{name}={mesh.shape[name]}" for name in names)
    product = f"a mesh axis {names[0]!r}" if len(names) == 1 else f"a product of {names}"
    raise ValueError(
        f"{what}: axis {axis!r} of size {size} cannot be split over {shards} devices ({sizes}): "
        f"{product} of {listed(divisors(size))} would do"
    )


def divisors(number: int) -> list[int]:
    """What divides `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(numbers: Sequence[int]) -> str:
    """Numbers to choose from, as text; the first of them if they are many."""
    shown = [str(n) for n in numbers[:_MOST_LISTED]]
    if len(numbers) > _MOST_LISTED:
        shown.append("...")
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)

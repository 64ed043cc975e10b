"""Mixture-of-experts layers for JAX, with tagged axes and block-scaled FP4 experts.

The names are those of `moe_jax.public`, which is imported when the first of them is asked for: JAX
and Flax take seconds to import, and the command `moe-jax --help` needs neither.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.public import *  # noqa: F403

_ENTRY = "mixture_of_experts"


class _Package(types.ModuleType):
    """The package, in which the name of the entry point is always that of the function.

    It is also the name of the module that defines it, which importing would put in its place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _ENTRY and isinstance(value, types.ModuleType):
            value = getattr(value, _ENTRY)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != _ENTRY and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    names = vars(importlib.import_module("moe_jax.public"))
    globals().update({n: value for n, value in names.items() if not n.startswith("_")})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    __getattr__("MoE")
    return sorted(globals())


sys.modules[__name__].__class__ = _Package

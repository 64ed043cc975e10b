"""Functions compiled ahead of their first call, so that compiling and running are timed apart."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Program:
    """A function that is compiled once for each kind of arguments.

    A kind is the shapes, dtypes and placements of the arrays and the values of the static
    arguments: what a compiled program is bound to.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *bound: Any,
        static: tuple[str, ...] = (),
        donate: tuple[int, ...] = (),
    ) -> None:
        """Takes a function of arrays.

        Args:
            function: what to compile.
            bound: its first arguments, the same ones at every call.
            static: names of keyword arguments that are compiled in.
            donate: positions of arguments whose memory the results may take, `bound` counted.
        """
        self._jitted = jax.jit(function, static_argnames=static, donate_argnums=donate)
        self._bound = bound
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def prepare(self, *args: Any, **static: Any) -> tuple[Callable[[], Any], float]:
        """The call with these arguments, ready to run, and the seconds that compiling it took.

        The seconds are 0 where it was compiled before.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (tree, *map(_kind, leaves), *static.items())
        seconds, compiled = 0.0, self._compiled.get(key)
        if compiled is None:
            begin = time.perf_counter()
            compiled = self._jitted.lower(*self._bound, *args, **static).compile()
            self._compiled[key] = compiled
            seconds = time.perf_counter() - begin
        return lambda: compiled(*self._bound, *args), seconds


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return jax.typeof(leaf)
    return jax.typeof(leaf), leaf.sharding, leaf.committed

"""A progress bar on a terminal, and nothing elsewhere."""

import sys
from collections.abc import Iterable, Iterator

_WIDTH = 24


class Progress:
    """One line on stderr that is written over, and cleared at the end.

    Args:
        total: how many steps there are.
        shown: whether to show it; by default where stderr is a terminal.
    """

    def __init__(self, total: int, shown: bool | None = None) -> None:
        self.total, self.done = total, 0
        self.shown = sys.stderr.isatty() if shown is None else shown

    def over[T](self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items, each of which is a step."""
        for item in items:
            self._draw(f"{what} {item}")
            yield item
            self.done += 1

    def step(self, what: str) -> None:
        """Begins a step that is not one of several."""
        self._draw(what)
        self.done += 1

    def close(self) -> None:
        """Clears the line."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _draw(self, what: str) -> None:
        if self.shown:
            filled = _WIDTH * self.done // max(self.total, 1)
            bar = "#" * filled + "." * (_WIDTH - filled)
            line = f"[{bar}] {self.done}/{self.total} {what}"[:100]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

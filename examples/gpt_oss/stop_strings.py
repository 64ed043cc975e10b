"""Ending a text before a stop string, while the text comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string is complete; no part of it is ever passed on.

    Text that may be the beginning of a stop string is held back until that is decided. If several
    are complete at the same character, the longest counts.

    Attributes:
        found: the stop string that ended the text, None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Takes the stop strings.

        Raises:
            ValueError: one is empty.
        """
        if not all(stops):
            raise ValueError("expected stop strings of at least one character, got an empty one")
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes more text; returns what can be passed on by now."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            _, start, self.found = min(ends)
            kept = start
        else:
            kept = len(self._held) - self._open()
        passed, self._held = self._held[:kept], self._held[kept:]
        return passed

    def flush(self) -> str:
        """Ends the text; returns what was held back and belongs to no stop string."""
        if self.found is not None:
            return ""
        passed, self._held = self._held, ""
        return passed

    def _open(self) -> int:
        """Length of the longest end of the held text that may begin a stop string."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )

"""Ctrl-C while a reply is made: it takes effect at once, but never cuts what is being shown."""

import signal
import threading
from collections.abc import Callable
from typing import Any, Self


class Interrupts:
    """Within its `with` block Ctrl-C raises KeyboardInterrupt: at once, or after a `whole` call.

    Attributes:
        pressed: whether Ctrl-C was pressed; who has dealt with it sets this to False.
    """

    def __init__(self) -> None:
        self.pressed = self._held = False
        # Only the main thread may handle signals; a process told to ignore them goes on doing so.
        self._handles = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        )
        self._previous: Any = signal.SIG_DFL

    def whole(self, act: Callable[[], None]) -> None:
        """Calls `act`; Ctrl-C waits for its end, a second one does not.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        self._held = True
        try:
            act()
        finally:
            self._held = False
        # Also for one that was raised where Python drops exceptions, such as in a finalizer.
        if self.pressed:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if self._handles:
            self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._previous)

    def _press(self, *_: object) -> None:
        waits = self._held and not self.pressed
        self.pressed = True
        if not waits:
            raise KeyboardInterrupt

"""Ctrl-C must not tear a state change apart.

Python raises KeyboardInterrupt between any two bytecodes of the main thread: between taking a page reference and noting it,
for instance. While an InterruptGate is entered it owns SIGINT: open, a signal goes to the handler that was there before;
closed, it is held back until the gate opens. Entering costs some microseconds, so a run of many steps enters once.

Other threads never get signals, so for them (and under a handler Python did not install) the gate does nothing.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class InterruptGate:
    """Holds SIGINT back while closed. Re-entrant, for one thread."""

    def __init__(self) -> None:
        self._depth = 0
        self._closed = False
        self._handler: Any = None  # what SIGINT meant before
        self._held: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> InterruptGate:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.open()
            self._handler = None

    def close(self) -> None:
        """From here on a signal waits."""
        self._closed = True

    def open(self) -> None:
        """A signal that waited takes effect now."""
        self._closed = False
        if self._held is not None:
            held, self._held = self._held, None
            self._handler(*held)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._closed:
            self._held = (number, frame)
        else:
            self._handler(number, frame)

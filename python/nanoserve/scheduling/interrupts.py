"""Ctrl-C must not tear a state change apart.

Python raises KeyboardInterrupt between any two bytecodes of the main thread: between taking a page reference and noting it,
for instance. `uninterrupted` holds the signal back until a block is done and delivers it then. Other threads never get
signals, so for them (and under a handler Python did not install) it does nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT during the block takes effect at its end."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])

"""What became of another process."""

from __future__ import annotations

import time
from pathlib import Path


def ends(process: int, within: float = 20) -> bool:
    """Whether a process that was killed is gone, or waits for its parent, `within` so many seconds.

    Whoever kills it hears nothing of when it died: it may still be running for a moment.
    """
    stat = Path("/proc") / str(process) / "stat"
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False

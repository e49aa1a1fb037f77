"""How much of the machine somebody else used while an engine was timed: from /proc, in cores."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class Disturbance:
    """Begins when made; `cores` at its end.

    Args:
        group: process group whose work is the measured one; this process's counts as such, too.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._began = time.monotonic()
        self._busy, self._own = _busy_s(), self._own_s()

    def cores(self) -> float | None:
        """Cores that others kept busy, the host's other guests included; None where there is no /proc."""
        busy, own = _busy_s(), self._own_s()
        if busy is None or self._busy is None:
            return None
        took = max(time.monotonic() - self._began, 1 / _TICKS)
        return max(0.0, (busy - self._busy - (own - self._own)) / took)

    def _own_s(self) -> float:
        """CPU seconds of the group so far, and of this process."""
        mine = os.times()
        return mine.user + mine.system + sum(_group_times(self._group))


def _busy_s() -> float | None:
    """CPU seconds of all processes since boot, and those the host took (steal)."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, interrupts, soft, steal = map(int, fields)
    return (user + nice + system + interrupts + soft + steal) / _TICKS


def _group_times(group: int) -> list[float]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            found.append((int(fields[11]) + int(fields[12])) / _TICKS)
    return found

"""How much memory this process may still take: what the machine has free, or what its cgroup leaves if that is less.

Linux counts reclaimable page cache as available (MemAvailable), and so does this: a container's inactive file pages are no
use of it. Elsewhere the answer is the physical memory, from sysconf. Everything is read below a root directory, so that
tests bring their own /proc and /sys.
"""

from __future__ import annotations

import os
from pathlib import Path

UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2^63


def available_memory(root: Path = Path("/")) -> int:
    """Bytes, at least 0.

    Raises:
        ValueError: the operating system tells neither available nor physical memory.
    """
    free = machine_available(root)
    limit = cgroup_available(root)
    return free if limit is None else min(free, limit)


def machine_available(root: Path = Path("/")) -> int:
    """Bytes the whole machine could give: MemAvailable, or physical memory where that is not told."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(
            "memory_bytes: this system does not tell how much memory it has, give the number"
        ) from error


def cgroup_available(root: Path = Path("/")) -> int | None:
    """Bytes left below the tightest limit of this process's control groups, None when there is none."""
    left = []
    for folder, limit_name, usage_name, file_name in _groups(root):
        limit = _number(folder / limit_name)
        if limit is None or limit >= UNLIMITED:
            continue
        reclaimable = _statistic(folder / "memory.stat", file_name)
        used = (_number(folder / usage_name) or 0) - reclaimable
        left.append(max(0, limit - max(0, used)))
    return min(left, default=None)


def _groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """(directory, limit file, usage file, statistic of reclaimable pages) of this process's groups and their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path is the host's while the mount shows only this group: then the mount itself is it.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        groups += [(folder, *names) for folder in folders if folder.is_dir()]
    return groups


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # v2 writes "max" for no limit


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0

"""Available memory as /proc and the control groups tell it, from trees made up for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoserve.machine_memory import available_memory, cgroup_available, machine_available

MIB = 2**20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(mib: int) -> dict[str, str]:
    return {
        "proc/meminfo": f"MemTotal: 999999999 kB\nMemFree: 1 kB\nMemAvailable:   {mib * 1024} kB\nBuffers: 5 kB\n"
    }


def test_without_groups_it_is_what_the_machine_has_available(tmp_path: Path) -> None:
    root = tree(tmp_path, machine(700))
    assert available_memory(root) == 700 * MIB
    assert cgroup_available(root) is None


def test_a_version_2_group_leaves_its_limit_less_what_is_in_use(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": f"{500 * MIB}\n",
        "sys/fs/cgroup/user/job/memory.current": f"{200 * MIB}\n",
        "sys/fs/cgroup/user/job/memory.stat": f"anon 1\ninactive_file {50 * MIB}\nactive_file 7\n",
    }
    assert available_memory(tree(tmp_path, machine(700) | group)) == 350 * MIB


def test_the_tightest_of_a_group_and_its_parents_counts(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": f"{80 * MIB}\n",
        "sys/fs/cgroup/user/memory.max": f"{90 * MIB}\n",
        "sys/fs/cgroup/user/memory.current": f"{30 * MIB}\n",
    }
    assert available_memory(tree(tmp_path, machine(700) | group)) == 60 * MIB


def test_the_machine_counts_when_the_group_allows_more(tmp_path: Path) -> None:
    group = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{9000 * MIB}\n"}
    assert available_memory(tree(tmp_path, machine(700) | group)) == 700 * MIB


def test_version_1(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/host/path\n0::/\n",
        # In a container the mount shows only this process's group, whatever the path says.
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{400 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{100 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {20 * MIB}\n",
    }
    assert available_memory(tree(tmp_path, machine(700) | group)) == 320 * MIB


def test_version_1_without_a_limit_says_so_with_a_huge_number(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
    }
    assert cgroup_available(tree(tmp_path, machine(700) | group)) is None


def test_more_in_use_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100\n",
        "sys/fs/cgroup/memory.current": "120\n",
    }
    assert available_memory(tree(tmp_path, machine(700) | group)) == 0


def test_a_path_that_climbs_out_reads_nothing_else(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/../../secret\n",
        "sys/secret/memory.max": "1\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    assert cgroup_available(tree(tmp_path, machine(700) | group)) is None


def test_elsewhere_it_is_the_physical_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr("os.sysconf", numbers.__getitem__)
    assert machine_available(tmp_path) == 4_096_000


def test_a_system_that_tells_nothing_is_asked_for_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", unknown)
    with pytest.raises(ValueError, match="memory_bytes: this system does not tell"):
        machine_available(tmp_path)


def test_this_machine_has_memory() -> None:
    assert MIB < available_memory() < 2**60

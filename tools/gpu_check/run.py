"""Runs the parts, each in a process of its own with a time limit, and keeps what they found in one file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.parts import BY_NAME, PARTS, Part
from tools.gpu_check.places import FAKE_BUILD, KERNELS, ROOT

_GRACE = 10.0  # seconds that a part may take longer than it was told
_TAIL = 1500  # characters of what a part that died has printed


def environment(fake: bool) -> dict[str, str]:
    """Of the parts: where the package, the driver and the emulator are."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), found.get("PYTHONPATH", "")])
    found.setdefault("HF_HUB_OFFLINE", "1")
    if fake:
        found["NANOSERVE_CUDA_DRIVER"] = str(FAKE_BUILD / "libfakecuda.so")
        found["NANOSERVE_CUBLAS"] = str(FAKE_BUILD / "libfakecublas.so")
        found["NANOSERVE_EMULATOR"] = str(FAKE_BUILD)
    return found


class Runner:
    """One run of the check.

    Args:
        out: the results' file, written after every part. If there is one of the same kernels and commit, as a call before this
            one has left it, its parts are kept.
        seconds: of all parts together.
    """

    def __init__(
        self, folder: Path, out: Path, seconds: float, *, fake: bool, tiny: bool, about: dict[str, Any]
    ) -> None:
        self.folder, self.out = folder, out
        self._fake, self._tiny = fake, tiny
        self._end = time.monotonic() + seconds
        self.results: dict[str, Any] = {**about, "fake": fake, "tiny": tiny or fake, "parts": {}}
        self._join()

    def run(self, names: Sequence[str] = ()) -> bool:
        """Whether every part ran and passed. `names`: those to run; none: all. What they need of others' results, they do without."""
        chosen = [BY_NAME[name] for name in names] or list(PARTS)
        self._own_kernels()
        for part in chosen:
            left = self._end - time.monotonic()
            if left >= 5:
                # A part's share is a GPU's: on an emulator each takes what it needs.
                self.results["parts"][part.name] = self._run(part, left if self._fake else min(part.seconds, left))  # fmt: skip
            else:  # what a call before this one has found stays
                self.results["parts"].setdefault(part.name, {"status": "left out", "seconds": 0.0})
            self._save()
            one = self.results["parts"][part.name]
            print(f"{part.name}: {one['status']} in {one['seconds']:.0f} s", flush=True)
        self.results["passed"] = all(one["status"] == "passed" for one in self.results["parts"].values())
        self._save()
        return bool(self.results["passed"])

    def _join(self) -> None:
        try:
            before = json.loads(self.out.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if all(before.get(key) == self.results.get(key) for key in ("commit", "kernels", "fake", "tiny")):
            self.results["parts"] = before["parts"]
            self.results["command"] = f"{before['command']}; {self.results['command']}"

    def _own_kernels(self) -> None:
        """Whoever unpacked the folder may be another user, or have made it writable: then kernels would be refused."""
        source = self.folder / KERNELS
        copy = self.folder / "run"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(mode=0o700)
        if source.is_dir():
            (copy / KERNELS).mkdir(mode=0o700)
            for path in source.iterdir():
                shutil.copyfile(path, copy / KERNELS / path.name)
                (copy / KERNELS / path.name).chmod(0o600)
        for path in self.folder.iterdir():
            if path.name not in (KERNELS, "run"):
                (copy / path.name).symlink_to(path.absolute())

    def _run(self, part: Part, seconds: float) -> dict[str, Any]:
        path = self.out.with_suffix(f".{part.name}.json").absolute()
        command = [
            sys.executable, "-m", "tools.gpu_check", "part", part.name, "--folder", str(self.folder / "run"), "--out", str(path),
            "--seconds", f"{seconds:.0f}", "--results", str(self.out.absolute()),
            *(["--fake"] if self._fake else []), *(["--tiny"] if self._tiny else []),
        ]  # fmt: skip
        begin = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(self._fake), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed, _ = process.communicate(timeout=seconds + _GRACE)
                is_late = False
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed, _ = process.communicate()
                is_late = True
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.unlink(missing_ok=True)
        found["seconds"] = round(time.monotonic() - begin, 1)
        found["status"] = status_of(found, process.returncode, is_late)
        if found["status"] in ("died", "took too long"):
            found["printed"] = printed[-_TAIL:]
        return found

    def _save(self) -> None:
        order = {part.name: number for number, part in enumerate(PARTS)}
        parts = self.results["parts"]
        self.results["parts"] = {name: parts[name] for name in sorted(parts, key=order.__getitem__)}
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.out)


def status_of(found: dict[str, Any], code: int, is_late: bool) -> str:
    """passed, failed, incomplete (it had no time for all), skipped, died or took too long."""
    if is_late:
        return "took too long"
    if code != 0 or not found.get("finished"):
        return "died"
    if any(not check["passed"] for check in found["checks"]):
        return "failed"
    if found["left_out"]:
        return "incomplete"
    has_found = found["checks"] or found["facts"] or found["tables"]
    return "passed" if has_found or not found["skips"] else "skipped"

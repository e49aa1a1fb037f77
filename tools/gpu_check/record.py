"""What a part found: checks that passed or failed, rows of numbers, what was skipped and why, what there was no time for.

Written to a file as it grows, so that a process that dies has told what it knew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_SAVE_EVERY = 0.5  # seconds


class Record:
    """Of one part.

    Args:
        path: the file it is kept in.
        seconds: the part may take; `has_time` says whether something still fits.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self._end = time.monotonic() + seconds
        self._saved = 0.0
        self.data: dict[str, Any] = {
            "finished": False, "at": "", "checks": [], "skips": [], "left_out": [], "facts": {}, "tables": {},
        }  # fmt: skip
        self.save()

    def check(self, name: str, passed: bool, detail: str = "") -> bool:
        self.data["checks"].append({"name": name, "passed": bool(passed), "detail": detail})
        if not passed:
            print(f"FAILED {name}: {detail}", flush=True)
        self._grown(now=not passed)
        return bool(passed)

    def check_bits(self, name: str, found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
        """Of float32 numbers."""
        differ = int((found.view(np.uint32) != wanted.view(np.uint32)).sum())
        return self.check(name, differ == 0, f"{differ} of {found.size} differ")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What raises in here fails as `name`, and others go on: but not after CUDA's errors, which spoil the context.

        The file says that it is being done before it is: a process that dies in it cannot say so afterwards.
        """
        from nanoserve.native import CudaError

        before = self.data["at"]
        self._at(name)
        try:
            yield
        except Exception as error:
            self.check(name, False, f"{type(error).__name__}: {error}")
            if isinstance(error, CudaError):
                raise
        self._at(before)

    def _at(self, name: str) -> None:
        self.data["at"] = name
        self.save()

    def fact(self, name: str, value: Any) -> None:
        self.data["facts"][name] = value
        self._grown()

    def row(self, table: str, **values: Any) -> None:
        self.data["tables"].setdefault(table, []).append(values)
        self._grown()

    def skip(self, name: str, reason: str) -> None:
        self.data["skips"].append({"name": name, "reason": reason})
        self._grown(now=True)

    def has_time(self, name: str, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; if not, `name` is listed as left out."""
        if self.seconds_left > seconds:
            return True
        self.leave_out(name)
        return False

    def leave_out(self, name: str) -> None:
        self.data["left_out"].append(name)
        self._grown(now=True)

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def finish(self) -> None:
        self.data["finished"] = True
        self.save()

    def _grown(self, now: bool = False) -> None:
        if now or time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data) + "\n", encoding="utf-8")
        os.replace(part, self.path)
        self._saved = time.monotonic()

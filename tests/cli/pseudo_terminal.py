"""A program on a terminal of its own: what a person at the keyboard sees and types."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

import nanoserve


class Terminal:
    """Runs `python -m nanoserve ...` under a pseudo-terminal, 200 columns wide."""

    def __init__(self, *arguments: str | Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(nanoserve.__file__).parents[1]), "COLUMNS": "200",
                       "TERM": "xterm", "PYTHONUNBUFFERED": "1"}  # fmt: skip
        command = [sys.executable, "-m", "nanoserve", *map(str, arguments)]
        self.shown = ""
        self._searched = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            # Who runs the tests in the background may have left Ctrl-C ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvpe(command[0], command, environment)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._fd)

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def expect(self, text: str, timeout: float = 120.0) -> str:
        """Wait until `text` is shown after what was found before; everything up to its end."""
        ends = time.monotonic() + timeout
        while (at := self.shown.find(text, self._searched)) < 0:
            if time.monotonic() > ends or not self.read_some():
                raise AssertionError(
                    f"{text!r} is not shown; on the screen: {self.shown[self._searched :]!r}"
                )
        before = self.shown[self._searched : at + len(text)]
        self._searched = at + len(text)
        return before

    def wait(self, timeout: float = 120.0, press: str = "") -> int:
        """The exit code, once the program has ended.

        `press` is pressed now and again every second, as a person would: what is typed in the instant between readline's
        showing of a prompt and its listening can be lost.
        """
        ends, again = time.monotonic() + timeout, 0.0
        while self.read_some():
            if press and time.monotonic() > again:
                self.press(press)
                again = time.monotonic() + 1
            if time.monotonic() > ends:
                raise AssertionError(f"still running; on the screen: {self.shown[-2000:]!r}")
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def read_some(self) -> bool:
        """Some more of the screen; False when the program has closed it."""
        if not select.select([self._fd], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that the other end is gone
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)

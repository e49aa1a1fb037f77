"""EngineProcess: an engine in a process of its own, spoken to in JSON lines (drivers/channel.py has the messages).

Whatever it does, dies, hangs, answers something else, becomes one EngineFailed, and nothing of it stays behind.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from nanoserve.workloads import Timeline, WorkloadRequest

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 5  # between asking and killing
MAX_REPLY_BYTES = 2**28
TAIL_CHARS = 400


class EngineFailed(RuntimeError):
    """An engine that is gone; the message says why."""


class EngineProcess:
    """A driver's process from its start to its end.

    Args:
        name: of the engine, for messages.
        command: what to run; engine and its children get a process group of their own.
        environment: beside this process's.
        options: the driver's first line.
        start_s, answer_s: how long loading and one run may take.

    Attributes:
        facts: what the driver says it loaded.

    Raises:
        EngineFailed: it did not come up.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        options: Mapping[str, Any],
        start_s: float = 600,
        answer_s: float = 600,
    ) -> None:
        self.name = name
        self._answer_s = answer_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._folder = tempfile.TemporaryDirectory()  # engines leave files where they run
        self._held = b""
        paths = [str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")]
        everything = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=everything,
                cwd=self._folder.name, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._folder.cleanup()
            raise EngineFailed(f"{name} could not be started: {error}") from error
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        try:
            self._send(options)
            facts = self._receive("ready", start_s)
            if not isinstance(facts, dict):
                self._fail(f"said it was ready with {facts!r:.80}")
            self.facts: dict[str, Any] = facts
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def serve(self, requests: Sequence[WorkloadRequest], max_in_flight: int) -> Timeline:
        """One run.

        Raises:
            EngineFailed: and the process is ended.
        """
        pairs = [(one.prompt, one.output_tokens) for one in requests]
        try:
            self._send({"requests": pairs, "max_in_flight": max_in_flight})
            held = self._receive("timeline", self._answer_s)
            try:
                return Timeline.from_json(held, [(len(prompt), output) for prompt, output in pairs])
            except ValueError as error:
                self._fail(f"answered garbage: {error}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and all its children."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()  # end of input: a driver leaves
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(STOP_S)
                break
            except subprocess.TimeoutExpired:
                self._signal(number)
        self._signal(signal.SIGKILL)  # what it started
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._fail("died")

    def _receive(self, key: str, limit_s: float) -> Any:
        """The value of `key` in the next message."""
        line = self._line(time.monotonic() + limit_s, limit_s)
        try:
            message = json.loads(line)
        except ValueError:
            self._fail(f"answered garbage: {line[:80]!r}")
        if not isinstance(message, dict) or not {key, "error"} & message.keys():
            self._fail(f"answered garbage: {line[:80]!r} instead of {key!r}")
        if "error" in message:
            self._fail(f"gave up: {message['error']!s:.300}", with_log=False)
        return message[key]

    def _line(self, deadline: float, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._held:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self._fail(f"did not answer within {limit_s:g} s")
                chunk = os.read(descriptor, 2**20)
                if not chunk:
                    self._fail("died")
                self._held += chunk
                if len(self._held) > MAX_REPLY_BYTES:
                    self._fail(f"answered garbage: a line of more than {MAX_REPLY_BYTES} bytes")
        line, _, self._held = self._held.partition(b"\n")
        return line

    def _fail(self, what: str, with_log: bool = True) -> NoReturn:
        if what == "died":
            try:
                what = f"died with exit code {self._process.wait(STOP_S)}"
            except subprocess.TimeoutExpired:
                what = "closed its output"
        tail = ""
        if with_log:
            self._log.seek(0)
            tail = " ".join(self._log.read().decode(errors="replace").split())[-TAIL_CHARS:]
        raise EngineFailed(f"{self.name} {what}" + (f": {tail}" if tail else ""))

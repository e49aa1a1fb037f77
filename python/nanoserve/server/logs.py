"""Logs as JSON lines on standard error, written by a thread of their own: a full pipe must not stop a token."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import threading
import time
from typing import Any

MAX_WAITING = 10_000  # records; what comes when so many wait is lost
END_S = 2.0  # for what waits at the end


class JsonLines(logging.Formatter):
    """One object per line. What a record has as `fields` is part of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: what clients send cannot move a terminal's cursor


class _Queue(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the listener is in this process and formats it whole

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


class LogWriter:
    """The thread that writes. Straight to the file: a lock of Python's that it held while the pipe is full would keep the
    process from ending."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord | None], descriptor: int = 2) -> None:
        self._waiting, self._descriptor = waiting, descriptor
        self._thread = threading.Thread(target=self._run, name="nanoserve-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Writes what waits, for some seconds at most."""
        until = time.monotonic() + END_S
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=END_S)
        self._thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        form = JsonLines()
        while (record := self._waiting.get()) is not None:
            line = form.format(record).encode() + b"\n"
            with contextlib.suppress(OSError):  # nobody reads it any more
                while line:
                    line = line[os.write(self._descriptor, line) :]


def start_logging(level: str, access: bool) -> LogWriter:
    """Sets up the server's loggers; stop the writer at the end."""
    waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING)
    for name in ("nanoserve", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Queue(waiting)], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # ours has more, and costs less
    # A client that hangs up is no news, and neither is one that sends nonsense: the access log and the metrics tell.
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("nanoserve.access").setLevel(logging.INFO if access else logging.CRITICAL)
    return LogWriter(waiting)

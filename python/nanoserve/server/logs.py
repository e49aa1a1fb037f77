"""Logs as JSON lines on standard error, written by a thread of their own: a full pipe must not stop a token."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import time
from typing import Any

MAX_WAITING = 10_000  # records; beyond, the oldest news is lost rather than time


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
        return json.dumps(line, ensure_ascii=False, default=str)


class _Queue(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the listener is in this process and formats it whole

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


def start_logging(level: str, access: bool) -> logging.handlers.QueueListener:
    """Sets up the server's loggers; stop the listener at the end."""
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING)
    out = logging.StreamHandler()
    out.setFormatter(JsonLines())
    listener = logging.handlers.QueueListener(waiting, out)
    for name in ("nanoserve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Queue(waiting)], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # ours has more, and costs less
    # A client that hangs up is no news, and neither is one that sends nonsense: the access log and the metrics tell.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("nanoserve.access").setLevel(logging.INFO if access else logging.CRITICAL)
    listener.start()
    return listener

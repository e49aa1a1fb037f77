"""Bars on stderr while a model loads: bytes of weights, then kernels.

They appear only on a terminal and only once loading has taken PATIENCE seconds, so a warm start of a small model shows
nothing at all. They vanish when loading is done. Callbacks come from the thread that loads; nothing here starts another one
before a bar is on the screen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nanoserve.cli.byte_size import format_size

PATIENCE = 0.5


class LoadingBars:
    """A context manager whose methods are LLM's `on_load` and `on_progress`."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._clock = clock
        self._began = clock()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LoadingBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def is_shown(self) -> bool:
        return self._progress is not None

    def on_load(self, done: int, total: int, name: str) -> None:
        self._update("weights", done, total, f"{format_size(done)} of {format_size(total)}")

    def on_progress(self, done: int, total: int, name: str) -> None:
        self._update("kernels", done, total, f"{done} of {total}  {name}")

    def _update(self, task: str, done: int, total: int, detail: str) -> None:
        if not self._console.is_terminal:
            return
        if self._progress is None:
            if self._clock() - self._began < PATIENCE:
                return
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[detail]}"), console=self._console, transient=True,
            )  # fmt: skip
            self._progress.start()
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, detail="")
        self._progress.update(self._tasks[task], completed=done, total=total, detail=escape(detail))

"""One answer on the screen: shown as it comes, stopped by Ctrl-C, and what it cost."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanoserve.cli.terminal import write

if TYPE_CHECKING:
    from nanoserve.outputs import RequestOutput, TextDelta


@dataclass(slots=True)
class Answer:
    """What came. `output` is None when the user stopped it: then `text` is what had come."""

    text: str
    num_tokens: int
    seconds: float
    output: RequestOutput | None

    @property
    def is_stopped(self) -> bool:
        return self.output is None

    def summary(self) -> str:
        """Tokens and time, in one line."""
        made = f"{self.num_tokens} tokens in {self.seconds:.1f} s ({self.num_tokens / max(self.seconds, 1e-9):.1f} tok/s)"
        if self.output is None:
            return f"stopped after {made}"
        usage = self.output.usage
        share = round(100 * usage.cached_tokens / max(1, usage.prompt_tokens))
        return f"prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} from cache ({share}%), {made}"


def show_answer(deltas: Generator[TextDelta]) -> Answer:
    """Writes the text as it comes. Ctrl-C ends it, the request is aborted then, and what came is returned."""
    began = time.perf_counter()
    pieces: list[str] = []
    num_tokens, output = 0, None
    with _single_interrupt():
        try:
            with closing(deltas):
                for delta in deltas:
                    pieces.append(delta.text)
                    num_tokens += len(delta.token_ids)
                    output = delta.output
                    write(delta.text)
        except KeyboardInterrupt:
            output = None
    write("\n")
    return Answer("".join(pieces), num_tokens, time.perf_counter() - began, output)


@contextmanager
def _single_interrupt() -> Iterator[None]:
    """The first SIGINT raises KeyboardInterrupt. Later ones do nothing: an impatient second Ctrl-C must not hit the cleaning up."""
    is_pending = True

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal is_pending
        if is_pending:
            is_pending = False
            raise KeyboardInterrupt

    before: Any = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

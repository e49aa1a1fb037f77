"""What has been said so far, and how the next turn reaches the model.

A turn is begun, runs, and is then kept, or not: until `keep` a conversation is as it was, so a refused, failed or empty turn
leaves no trace. What is kept is sent again with the next turn, word for word, and its KV is found in the prefix cache.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nanoserve.llm import LLM
    from nanoserve.outputs import TextDelta
    from nanoserve.sampling import SamplingParams


class Conversation(Protocol):
    """What the read-eval-print loop needs of one."""

    turns: list[tuple[str, str]]  # (what the user wrote, what the model answered)
    system: str | None

    def begin(self, text: str) -> Generator[TextDelta]:
        """Start the next turn. Raises ValueError (RequestRefused: no room), and nothing was queued then."""
        ...

    def saved(self) -> str:
        """The conversation as a file's content."""
        ...


@dataclass(slots=True)
class Messages:
    """A conversation through the checkpoint's chat template."""

    llm: LLM
    params: SamplingParams
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, text: str) -> Generator[TextDelta]:
        return self.llm.stream_chat([*self._messages(), {"role": "user", "content": text}], self.params)

    def saved(self) -> str:
        return json.dumps({"messages": self._messages()}, indent=2, ensure_ascii=False) + "\n"

    def _messages(self) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for text, answer in self.turns:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return messages


@dataclass(slots=True)
class PlainText:
    """One growing text for models that know no messages: each turn adds a line that the model goes on from."""

    llm: LLM
    params: SamplingParams
    system: str | None = None  # never set: plain text has no such part
    turns: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, text: str) -> Generator[TextDelta]:
        return self.llm.stream(self.saved() + text, self.params)

    def saved(self) -> str:
        return "".join(f"{text}{answer}\n" for text, answer in self.turns)

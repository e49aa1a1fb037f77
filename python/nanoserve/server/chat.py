"""/v1/chat/completions: messages to the assistant's next one, whole or in events, text and tool calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from nanoserve.outputs import TextDelta
from nanoserve.server.answer import Answer
from nanoserve.server.event_stream import event
from nanoserve.server.parameters import ChatRequest
from nanoserve.server.token_text import chat_logprobs
from nanoserve.server.tool_calls import ToolCall, ToolCallParser, ToolFormat


class Choice:
    """One sequence as it grows: the deltas of its events, and what they add up to; calls beyond `max_calls` are left out."""

    def __init__(self, index: int, form: ToolFormat | None, max_calls: int | None) -> None:
        self.index, self._max_calls = index, max_calls
        self._parser = None if form is None else ToolCallParser(form)
        self.content = ""
        self.calls: list[dict[str, Any]] = []

    def push(self, delta: TextDelta) -> dict[str, Any]:
        """The delta of an event; empty when nothing is certain yet."""
        if self._parser is None:
            parts: list[str | ToolCall] = [delta.text] if delta.text else []
        else:
            parts = self._parser.push(delta.text)
            if delta.finish_reason is not None:
                parts += self._parser.finish()
        made: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, ToolCall):
                if len(self.calls) == self._max_calls:
                    continue
                call = {
                    "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                    "function": {"name": part.name, "arguments": part.arguments},
                }  # fmt: skip
                made.setdefault("tool_calls", []).append({"index": len(self.calls), **call})
                self.calls.append(call)
            else:
                made["content"] = made.get("content", "") + part
                self.content += part
        return made

    def reason(self, reason: str | None) -> str | None:
        return "tool_calls" if self.calls and reason == "stop" else reason

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        return message


class ChatAnswer(Answer):
    """The answer to one request.

    Args:
        form: how the model writes tool calls; None if none are to be looked for.
    """

    def __init__(self, request: ChatRequest, form: ToolFormat | None, **common: Any) -> None:
        super().__init__(request, **common)
        max_calls = 1 if request.parallel_tool_calls is False else None
        self._choices = [Choice(index, form, max_calls) for index in range(request.n or 1)]
        self._logprobs = bool(request.logprobs)
        self._plain = form is None and not self._logprobs and not request.return_token_ids
        self.kind = "chat.completion.chunk" if request.stream else "chat.completion"

    async def events(self) -> AsyncIterator[bytes]:
        head = json.dumps(self.head(), separators=(",", ":"))[:-1].encode()
        begun: set[int] = set()
        async for news in self.call.news():
            out = []
            for at, delta in news:
                index = delta.index
                if index not in begun:
                    begun.add(index)
                    out.append(event(self._chunk(index, {"role": "assistant", "content": ""})))
                if self._plain and delta.finish_reason is None:
                    if delta.text:
                        text = json.dumps(delta.text, ensure_ascii=False).encode()
                        out.append(
                            b'data: %b,"choices":[{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]}\n\n'
                            % (head, index, text)
                        )
                    continue
                out += self._events_of(at, delta)
            if out:
                yield b"".join(out)

    def _events_of(self, at: int, delta: TextDelta) -> list[bytes]:
        choice = self._choices[delta.index]
        made = choice.push(delta)
        chunk = self._chunk(delta.index, made, choice.reason(delta.finish_reason))
        (one,) = chunk["choices"]
        if self._logprobs:
            one["logprobs"] = {"content": chat_logprobs(self.tokenizer, delta.logprobs or ())}
        if self.request.return_token_ids:
            one["token_ids"] = list(delta.token_ids)
        if delta.finish_reason is not None:
            one["stop_reason"] = self.stop_reason(at, delta)
        return [event(chunk)] if made or one["logprobs"] or delta.finish_reason or "token_ids" in one else []

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {
            **self.head(),
            "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}],
        }

    async def whole(self) -> dict[str, Any]:
        endings: dict[int, dict[str, Any]] = {}
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for news in self.call.news():
            for at, delta in news:
                choice = self._choices[delta.index]
                choice.push(delta)
                logprobs[delta.index] += chat_logprobs(self.tokenizer, delta.logprobs or ())
                if delta.finish_reason is not None:
                    reason = choice.reason(delta.finish_reason)
                    endings[delta.index] = {
                        "finish_reason": reason,
                        "stop_reason": self.stop_reason(at, delta),
                    }
        choices = [
            {
                "index": choice.index,
                "message": choice.message,
                "logprobs": {"content": logprobs[choice.index]} if self._logprobs else None,
                **endings[choice.index],
                **self.extras(0, choice.index),
            }
            for choice in self._choices
        ]
        return {**self.head(), "choices": choices, "usage": self.usage()}

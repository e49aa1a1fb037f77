"""/v1/completions: prompts to text, whole or in events. Both are made of the same choices, so they cannot differ."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nanoserve.outputs import TextDelta
from nanoserve.server.answer import Answer
from nanoserve.server.event_stream import event
from nanoserve.server.parameters import CompletionRequest
from nanoserve.server.token_text import CompletionLogprobs
from nanoserve.text_request import AnyTokenizer


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """One entry per prompt: `prompt` may be one, or a list of several."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class _Choice:
    """One sequence as it grows."""

    def __init__(
        self, index: int, echoed: str | None, request: CompletionRequest, tokenizer: AnyTokenizer | None
    ) -> None:
        self.index = index
        self._echoed, self._request = echoed, request
        self._logprobs = None if request.logprobs is None else CompletionLogprobs(tokenizer)
        self.text = ""
        self.lists: dict[str, list[Any]] = {}

    def push(
        self, delta: TextDelta, prompt: Sequence[int], prompt_logprobs: Sequence[Any] | None
    ) -> dict[str, Any]:
        """The next piece, as a choice of an event."""
        text, entries, tokens = delta.text, list(delta.logprobs or ()), list(delta.token_ids)
        if self._request.max_tokens == 0:
            text, entries, tokens = "", [], []
        if self._echoed is not None:
            text, self._echoed = self._echoed + text, None
            if prompt_logprobs is not None:
                entries, tokens = [*prompt_logprobs, *entries], [*prompt, *tokens]
        choice: dict[str, Any] = {"index": self.index, "text": text, "logprobs": None, "finish_reason": None}
        if self._logprobs is not None:
            more = self._logprobs.more(entries, tokens)
            choice["logprobs"] = more
            if not self._request.stream:
                for name, values in more.items():
                    self.lists.setdefault(name, []).extend(values)
        if self._request.return_token_ids:
            choice["token_ids"] = [] if self._request.max_tokens == 0 else list(delta.token_ids)
        if delta.finish_reason is not None:
            choice["finish_reason"] = delta.finish_reason
        self.text += text
        return choice


class CompletionAnswer(Answer):
    """The answer to one request."""

    kind = "text_completion"

    def __init__(self, request: CompletionRequest, echoed: list[str] | None, **common: Any) -> None:
        super().__init__(request, **common)
        self._n = request.n or 1
        self._choices = [
            _Choice(index, None if echoed is None else echoed[index // self._n], request, self.tokenizer)
            for index in range(self._n * len(self.call.jobs))
        ]
        self._plain = (
            request.logprobs is None
            and not request.return_token_ids
            and request.max_tokens != 0
            and echoed is None
        )
        self._endings: dict[int, tuple[str, Any]] = {}

    def _push(self, at: int, delta: TextDelta) -> dict[str, Any]:
        first = self.call.jobs[at].text.requests[0]
        choice = self._choices[at * self._n + delta.index]
        return choice.push(delta, first.prompt_tokens, first.prompt_logprobs)

    async def events(self) -> AsyncIterator[bytes]:
        head = json.dumps(self.head(), separators=(",", ":"))[:-1].encode()
        async for news in self.call.news():
            out = []
            for at, delta in news:
                if self._plain and delta.finish_reason is None:
                    if delta.text:
                        index = at * self._n + delta.index
                        text = json.dumps(delta.text, ensure_ascii=False)
                        out.append(
                            b'data: %b,"choices":[{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}]}\n\n'
                            % (head, index, text.encode())
                        )
                    continue
                choice = self._push(at, delta)
                if delta.finish_reason is not None:
                    choice["stop_reason"] = self.stop_reason(at, delta)
                out.append(event({**self.head(), "choices": [choice]}))
            if out:
                yield b"".join(out)

    async def whole(self) -> dict[str, Any]:
        async for news in self.call.news():
            for at, delta in news:
                choice = self._push(at, delta)
                if delta.finish_reason is not None:
                    self._endings[choice["index"]] = (delta.finish_reason, self.stop_reason(at, delta))
        choices = []
        for one in self._choices:
            reason, stop_reason = self._endings[one.index]
            choices.append(
                {
                    "index": one.index,
                    "text": one.text,
                    "logprobs": one.lists or None,
                    "finish_reason": reason,
                    "stop_reason": stop_reason,
                    **self.extras(*divmod(one.index, self._n)),
                }
            )
        return {**self.head(), "choices": choices, "usage": self.usage()}

"""Answer: what the answers of all generating routes have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from nanoserve.outputs import TextDelta
from nanoserve.server.call import Call
from nanoserve.server.event_stream import event
from nanoserve.server.parameters import SamplingFields
from nanoserve.server.token_text import prompt_logprobs
from nanoserve.text_request import AnyTokenizer


class Answer:
    """One request's answer, to be had whole or as events.

    Args:
        call: its jobs, opened.
        answer_id: of the answer; created: seconds since 1970; model: its served name.
        tokenizer: the checkpoint's, for log-probabilities.
    """

    kind = ""

    def __init__(
        self,
        request: SamplingFields,
        *,
        call: Call,
        answer_id: str,
        created: int,
        model: str,
        tokenizer: AnyTokenizer | None,
    ) -> None:
        self.request, self.call, self.tokenizer = request, call, tokenizer
        self._id, self._created, self._model = answer_id, created, model

    @property
    def wants_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def head(self) -> dict[str, Any]:
        head = {"id": self._id, "object": self.kind, "created": self._created, "model": self._model}
        # As OpenAI has it: every chunk has the field if it was asked for, and the last one's is not null.
        return {**head, "usage": None} if self.wants_usage else head

    def usage(self) -> dict[str, Any]:
        made = self.call.usage
        completion = 0 if self.request.max_tokens == 0 else made.completion_tokens
        return {
            "prompt_tokens": made.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": made.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": made.cached_tokens},
        }

    def stop_reason(self, at: int, delta: TextDelta) -> int | str | None:
        """The stop string or token that ended a sequence, as vLLM tells it."""
        return self.call.jobs[at].text.stop_reason(delta.index)

    def extras(self, at: int, index: int) -> dict[str, Any]:
        """What a whole choice has if it was asked for: its tokens, the prompt's log-probabilities."""
        made: dict[str, Any] = {}
        request = self.call.jobs[at].text.requests[index]
        if self.request.return_token_ids:
            made["token_ids"] = [] if self.request.max_tokens == 0 else list(request.output_tokens)
        if self.request.prompt_logprobs is not None and index == 0:
            made["prompt_logprobs"] = prompt_logprobs(self.tokenizer, request.prompt_logprobs or ())
        return made

    def events(self) -> AsyncIterator[bytes]:
        """Whole server-sent events, without the last ones."""
        raise NotImplementedError

    def ending(self) -> bytes:
        """The event that follows the last choice, if one was asked for."""
        return event({**self.head(), "choices": [], "usage": self.usage()}) if self.wants_usage else b""

    async def whole(self) -> dict[str, Any]:
        """The answer's JSON."""
        raise NotImplementedError

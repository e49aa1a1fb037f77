"""Service: a checked request to jobs. Text work (templates, tokenizing, grammars) is done in a few threads, not in the event loop."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nanoserve.checks import shown
from nanoserve.llm import LLM
from nanoserve.sampling import SamplingParams
from nanoserve.server.answer import Answer
from nanoserve.server.answer_form import check_combinations, structured_format, tools_of
from nanoserve.server.call import Call
from nanoserve.server.chat import ChatAnswer
from nanoserve.server.completions import CompletionAnswer, prompts_of
from nanoserve.server.errors import ApiError, bad_request
from nanoserve.server.gateway import Gateway
from nanoserve.server.job import Job
from nanoserve.server.parameters import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    TokenizeRequest,
)
from nanoserve.server.request_body import RequestBodies
from nanoserve.server.sampling_fields import check_logprobs, sampling_params
from nanoserve.server.settings import ServerSettings
from nanoserve.server.text_threads import TextThreads
from nanoserve.server.tool_calls import ToolFormat, tool_format
from nanoserve.text_request import AnyTokenizer, TextRequest

T = TypeVar("T")
# What the engine's own checks call a field, and what it is called here.
_RENAMED = {
    "text": "prompt",
    "structured_outputs.json": "response_format.json_schema.schema",
    "structured_outputs.tagged": "tools",
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the number and name of a key, when the request's first byte came, and when its connection was accepted."""

    key: int
    name: str
    received_s: float
    accepted_s: float


class Service:
    """What the routes do.

    Args:
        llm: its engine is the gateway's from now on.
    """

    def __init__(self, llm: LLM, gateway: Gateway, settings: ServerSettings, model: str) -> None:
        self.llm, self.gateway, self.settings, self.model = llm, gateway, settings, model
        self.created = int(time.time())
        self.max_model_len = llm.engine.executor.max_model_len
        template = llm.chat_template
        self.tool_format: ToolFormat | None = None
        if template is not None:
            self.tool_format = tool_format(
                template.source if template.tool_source is None else template.tool_source
            )
        self.threads = TextThreads(settings, gateway.metrics)
        self.bodies = RequestBodies(settings, self.threads)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(
                404, f"model: {shown(name)} is not served, {shown(self.model)} is", "model_not_found", "model"
            )

    async def in_thread(self, work: Callable[[], T], caller: Caller) -> T:
        """Text work; its ValueErrors are the client's mistakes."""
        try:
            return await self.threads.run(work, caller.key)
        except ValueError as error:
            raise bad_request(error, _RENAMED) from error

    # ---- calls

    async def complete(self, request: CompletionRequest, caller: Caller) -> Answer:
        self.check_model(request.model)
        prompts = prompts_of(request)
        if len(prompts) > self.settings.max_prompts:
            raise ApiError(
                400,
                f"prompt: {len(prompts)} prompts, at most {self.settings.max_prompts} are allowed",
                "invalid_value",
                "prompt",
            )
        if (sequences := len(prompts) * (request.n or 1)) > self.settings.max_sequences:
            raise ApiError(
                400,
                f"n: {request.n} of {len(prompts)} prompts are {sequences} sequences, at most {self.settings.max_sequences} "
                "are allowed",
                "invalid_value",
                "n",
            )
        more: dict[str, Any] = structured_format(request)
        if request.logprobs is not None:
            more["logprobs"] = request.logprobs
            if request.echo:
                more["prompt_logprobs"] = request.logprobs
        check_combinations(request)
        add_special = True if request.add_special_tokens is None else request.add_special_tokens

        def tokens_of(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                return self.llm.get_tokenizer().encode(prompt, add_special_tokens=add_special)
            return prompt

        def prepare() -> tuple[list[Callable[[asyncio.Event], Job]], list[str] | None]:
            tokens = [tokens_of(prompt) for prompt in prompts]
            made = [self._job(request, caller, one, more, len(tokens)) for one in tokens]
            echoed = None
            if request.echo:
                echoed = [
                    one if isinstance(one, str) else self.llm.get_tokenizer().decode(one) for one in prompts
                ]
            return made, echoed

        jobs, echoed = await self.in_thread(prepare, caller)
        request.prompt = []  # the answer may take long, and the jobs have their tokens
        return CompletionAnswer(request, echoed, **self._common("cmpl", jobs))

    async def chat(self, request: ChatRequest, caller: Caller) -> Answer:
        self.check_model(request.model)
        template = self.llm.chat_template
        if template is None:
            raise ApiError(
                400,
                "messages: this model has no chat template: use /v1/completions",
                "no_chat_template",
                "messages",
            )
        more: dict[str, Any] = structured_format(request)
        if request.logprobs:
            more["logprobs"] = request.top_logprobs or 0
        elif request.top_logprobs is not None:
            raise ApiError(400, "top_logprobs: needs logprobs: true", "invalid_value", "top_logprobs")
        check_combinations(request)
        form, tools = tools_of(request, self.tool_format, more)
        variables = request.chat_template_kwargs or {}
        if taken := sorted(variables.keys() & {"messages", "tools", "add_generation_prompt"}):
            raise ApiError(
                400,
                f"chat_template_kwargs.{taken[0]}: is a parameter of its own",
                "invalid_value",
                "chat_template_kwargs",
            )

        def prepare() -> Callable[[asyncio.Event], Job]:
            text = template.render(
                _with_parsed_arguments(request.messages), tools=tools,
                add_generation_prompt=request.add_generation_prompt is not False, **variables,
            )  # fmt: skip
            tokens = self.llm.get_tokenizer().encode(text, add_special_tokens=False)
            return self._job(request, caller, tokens, more)

        job = await self.in_thread(prepare, caller)
        request.messages = []  # the answer may take long, and the job has their tokens
        return ChatAnswer(request, form, **self._common("chatcmpl", [job]))

    def _job(
        self,
        request: SamplingFields,
        caller: Caller,
        tokens: Sequence[int],
        more: dict[str, Any],
        num_prompts: int = 1,
    ) -> Callable[[asyncio.Event], Job]:
        """In a text thread: everything of a job that takes time."""
        params = sampling_params(request, self.llm.sampling_defaults, len(tokens), self.max_model_len, more)
        check_logprobs(params, len(tokens), num_prompts)
        text = self._text(tokens, params, request.priority or 0, caller)
        settings = self.settings
        return lambda news: Job(
            text, key=caller.key, owner=caller.name, received_s=caller.received_s,
            accepted_s=caller.accepted_s, news=news,
            queue_timeout_s=min(request.queue_timeout or settings.queue_timeout_s, settings.queue_timeout_s),
            timeout_s=min(request.timeout or settings.request_timeout_s, settings.request_timeout_s),
        )  # fmt: skip

    def _text(
        self, tokens: Sequence[int], params: SamplingParams, priority: int, caller: Caller
    ) -> TextRequest:
        space = 0 if self.settings.share_prefix_cache else caller.key
        return TextRequest(
            self.llm.engine, self.llm.tokenizer, tokens, params, priority=priority, cache_space=space,
            grammar=self.llm.compile_grammar(params),
        )  # fmt: skip

    def _common(self, prefix: str, make: Sequence[Callable[[asyncio.Event], Job]]) -> dict[str, Any]:
        news = asyncio.Event()
        call = Call(self.gateway, [one(news) for one in make], news)
        return {
            "call": call, "answer_id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model,
            "tokenizer": self.llm.tokenizer,
        }  # fmt: skip

    # ---- tokens

    async def tokenize(self, request: TokenizeRequest, caller: Caller) -> dict[str, Any]:
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "prompt: either prompt or messages is needed", "invalid_value", "prompt")
        template, tokenizer = self.llm.chat_template, self._tokenizer()
        if request.messages is not None and template is None:
            raise ApiError(400, "messages: this model has no chat template", "no_chat_template", "messages")

        def work() -> list[int]:
            if request.messages is not None:
                assert template is not None
                text = template.render(_with_parsed_arguments(request.messages))
                return tokenizer.encode(text, add_special_tokens=False)
            return tokenizer.encode(
                request.prompt or "", add_special_tokens=request.add_special_tokens is not False
            )

        tokens = await self.in_thread(work, caller)
        made: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": self.max_model_len}
        if request.return_token_strs:
            made["token_strs"] = [tokenizer.token_text(token) for token in tokens]
        return made

    async def detokenize(self, request: DetokenizeRequest, caller: Caller) -> dict[str, Any]:
        self.check_model(request.model)
        tokenizer = self._tokenizer()
        return {
            "prompt": await self.in_thread(
                lambda: tokenizer.decode(request.tokens, skip_special_tokens=False), caller
            )
        }

    def _tokenizer(self) -> AnyTokenizer:
        if self.llm.tokenizer is None:
            raise ApiError(400, "prompt: this model has no tokenizer", "no_tokenizer", "prompt")
        return self.llm.tokenizer


def _with_parsed_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Templates want the arguments of earlier calls as objects, OpenAI's clients send them as JSON text."""
    made = []
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            made.append(message)
            continue
        parsed = []
        for j, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                try:
                    value = json.loads(arguments or "{}")
                except (ValueError, RecursionError):
                    place = f"messages[{i}].tool_calls[{j}].function.arguments"
                    raise ValueError(f"{place}: {shown(arguments)} must be JSON") from None
                call = {**call, "function": {**(function or {}), "arguments": value}}
            parsed.append(call)
        made.append({**message, "tool_calls": parsed})
    return made

"""LLM: a checkpoint in, text out.

    with text      generate(prompts)      stream(prompt)         prompts are texts or token lists
    with messages  chat(conversation)     stream_chat(messages)  through the checkpoint's own chat template

It loads a checkpoint and drives the engine; what a request is, and what its text is, TextRequest knows. The streamed and the
whole text come from the same pieces, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanoserve.errors import RequestRefused
from nanoserve.memory_plan import plan_memory
from nanoserve.models.checkpoint import checkpoint_directory, load_weights
from nanoserve.models.config import ModelConfig
from nanoserve.nano_engine import NanoServingEngine, as_list, params_per_prompt
from nanoserve.outputs import RequestOutput, TextDelta
from nanoserve.sampling import SamplingParams
from nanoserve.text.chat_template import ChatTemplate
from nanoserve.text.generation_config import GenerationConfig
from nanoserve.text.tokenizer import load_tokenizer
from nanoserve.text_request import AnyTokenizer, TextRequest

OnProgress = Callable[[int, int, str], None]
Message = Mapping[str, Any]


class LLM:
    """A model ready to generate.

    Args:
        model: checkpoint directory (config.json and safetensors), or a repository id of the Hugging Face hub.
        dtype: "float32", the only one yet.
        kv_cache_bytes: memory for the KV pool; None takes what plan_memory finds sensible for this machine.
        max_num_seqs, max_num_batched_tokens: as NanoServingEngine's max_batch_size and max_num_batched_tokens.
        max_model_len: longest prompt + output; None takes the model's, or what fits the pool.
        revision: branch, tag or commit of a hub repository.
        eos_token_id: token(s) that end a request; None takes the checkpoint's.
        on_load: called as (bytes done, bytes in total, weight name) while weights are packed.
        on_progress: called as (done, total, kernel name) while kernels compile.
        engine_options: further keywords of NanoServingEngine.

    Attributes:
        directory: where it was loaded from. config: its ModelConfig. tokenizer: None when the checkpoint has none. chat_template: likewise.
        generation: the checkpoint's GenerationConfig. default_params: the SamplingParams it asks for.

    Raises:
        CheckpointError: what is wrong with the checkpoint. ValueError: naming the field, its value and its limit.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "float32",
        kv_cache_bytes: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        *,
        revision: str | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        on_load: OnProgress | None = None,
        on_progress: OnProgress | None = None,
        **engine_options: Any,
    ) -> None:
        if dtype != "float32":
            raise ValueError(f"dtype: {dtype!r} is not supported, only 'float32'")
        self.directory = directory = checkpoint_directory(model, revision=revision)
        self.config = ModelConfig.from_pretrained(directory)
        # Before the weights: a bad tokenizer should not cost a minute's loading.
        self.tokenizer: AnyTokenizer | None = load_tokenizer(directory, self.config.vocab_size)
        self.chat_template = None if self.tokenizer is None else ChatTemplate.load(directory, self.tokenizer)
        self.generation = GenerationConfig.load(directory, self.config.vocab_size)
        self.default_params = SamplingParams(**self.generation.defaults)
        plan = plan_memory(
            self.config, kv_cache_bytes=kv_cache_bytes, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
            page_size=engine_options.get("page_size", 16), max_num_batched_tokens=max_num_batched_tokens,
        )  # fmt: skip
        self.engine = NanoServingEngine(
            self.config,
            load_weights(directory),
            kv_cache_pages=plan.num_pages,
            max_batch_size=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            eos_token_id=self._eos_token_ids() if eos_token_id is None else eos_token_id,
            on_load=on_load,
            on_progress=on_progress,
            **engine_options,
        )

    def _eos_token_ids(self) -> tuple[int, ...]:
        """generation_config.json's, as transformers ends by; else config.json's; else the tokenizer's."""
        named = self.generation.eos_token_ids or self.config.eos_token_ids
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return named or (() if own is None else (own,))

    # ---- text

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete texts or token lists; outputs in prompt order. None samples as the checkpoint asks for.

        Raises:
            ValueError: naming the prompt, the field, its value and its limit; nothing was generated then.
        """
        listed = [prompts] if isinstance(prompts, str) else as_list("prompts", prompts)
        per_prompt = self._params(sampling_params, len(listed))
        jobs = []
        for index, (prompt, params) in enumerate(zip(listed, per_prompt, strict=True)):
            with _naming(f"prompts[{index}]"):
                jobs.append(TextRequest(self.engine, self.tokenizer, prompt, params))
        return self._run(jobs)

    def stream(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta]:
        """One prompt, as it is generated. Closing the iterator aborts the rest."""
        (params,) = self._params(sampling_params, 1)
        return self._deltas(TextRequest(self.engine, self.tokenizer, prompt, params))

    # ---- messages

    def chat(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """The assistant's next message in one conversation or several; outputs in their order.

        Args:
            conversation: messages with "role" and "content", or a list of such conversations.
            template_options: tools=, add_generation_prompt= and variables of the chat template.
        """
        listed = as_list("conversation", conversation)
        conversations = [listed] if listed and isinstance(listed[0], Mapping) else listed
        per_prompt = self._params(sampling_params, len(conversations))
        jobs = []
        for index, (messages, params) in enumerate(zip(conversations, per_prompt, strict=True)):
            with _naming(f"conversation[{index}]"):
                jobs.append(self._chat_request(messages, params, template_options))
        return self._run(jobs)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> Generator[TextDelta]:
        """The assistant's next message, as it is generated. Closing the iterator aborts the rest."""
        (params,) = self._params(sampling_params, 1)
        return self._deltas(self._chat_request(messages, params, template_options))

    def _chat_request(
        self, messages: Sequence[Message], params: SamplingParams, template_options: Mapping[str, Any]
    ) -> TextRequest:
        if self.chat_template is None or self.tokenizer is None:
            raise ValueError(
                "messages: this checkpoint has no chat template, use generate with a prompt instead"
            )
        prompt = self.chat_template.render(messages, **template_options)
        tokens = self.tokenizer.encode(prompt, add_special_tokens=False)
        return TextRequest(self.engine, self.tokenizer, prompt, params, prompt_tokens=tokens)

    # ---- tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens."""
        return self._need_tokenizer().encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._need_tokenizer().decode(tokens)

    def _need_tokenizer(self) -> AnyTokenizer:
        if self.tokenizer is None:
            raise ValueError("text: this checkpoint has no tokenizer")
        return self.tokenizer

    # ---- running

    def _params(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        return params_per_prompt(self.default_params if sampling_params is None else sampling_params, count)

    def _run(self, jobs: Sequence[TextRequest]) -> list[RequestOutput]:
        for _ in self._steps(jobs):
            pass
        return [job.result() for job in jobs]

    def _deltas(self, job: TextRequest) -> Generator[TextDelta]:
        for _ in self._steps([job]):
            yield from job.deltas()
        yield from job.deltas()  # the ends of those that were aborted between two steps

    def _steps(self, jobs: Sequence[TextRequest]) -> Iterator[None]:
        """Runs the engine until all jobs are finished, yielding after each step; whatever ends it early aborts the rest."""
        engine, growing = self.engine, list(jobs)
        left = sum(len(job.requests) for job in jobs)
        ours = {request.req_id for job in jobs for request in job.requests}
        try:
            while left:
                for job in growing:
                    for request in job.due():
                        engine.submit(request)
                growing = [job for job in growing if not job.is_all_submitted]
                left -= sum(request.req_id in ours for request in engine.step().finished)
                yield
                if not (growing or engine.has_unfinished):  # somebody aborted the rest
                    left = 0
        finally:
            if left:
                for req_id in ours:
                    engine.abort(req_id)


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says where what is refused inside stood."""
    try:
        yield
    except RequestRefused as error:
        raise RequestRefused(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error

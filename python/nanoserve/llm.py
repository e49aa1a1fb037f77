"""LLM: a checkpoint in, text out.

    with text      generate(prompts)      stream(prompt)         prompts are texts or token lists
    with messages  chat(conversation)     stream_chat(messages)  through the checkpoint's own chat template

It loads a checkpoint and drives the engine; what a request is, and what its text is, TextRequest knows. The streamed and the
whole text come from the same pieces, so they cannot differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoserve.checks import whole_number
from nanoserve.device_name import device_ordinal, refuse_options
from nanoserve.errors import CheckpointError, RequestRefused
from nanoserve.memory_plan import MAX_SLOTS, plan_memory
from nanoserve.models.checkpoint import checkpoint_directory, load_weights
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import bind_weights, loaded_bytes, stored_dtype
from nanoserve.nano_engine import NanoServingEngine, as_list, params_per_prompt
from nanoserve.outputs import RequestOutput, TextDelta
from nanoserve.precision import choose_precision
from nanoserve.quantization_error import QuantizationReport
from nanoserve.sampling import SamplingParams
from nanoserve.text.chat_template import ChatTemplate
from nanoserve.text.generation_config import GenerationConfig
from nanoserve.text.grammar import Grammar, GrammarCompiler
from nanoserve.text.tokenizer import load_tokenizer
from nanoserve.text_request import AnyTokenizer, Prompt, TextRequest

if TYPE_CHECKING:
    from nanoserve.cuda.backend import CudaBackend

OnProgress = Callable[[int, int, str], None]
Message = Mapping[str, Any]
_ENGINE_OPTIONS = frozenset(
    "page_size max_chunk_size policy enable_prefix_cache num_threads seed weight_cache".split()
)


class LLM:
    """A model ready to generate.

    Args:
        model: checkpoint directory (config.json and safetensors), or a repository id of the Hugging Face hub.
        dtype: "float32", "bfloat16", or "auto": bfloat16 for a checkpoint stored so on a CPU that multiplies it, or stored in 16
            bits on a GPU; else float32 (precision.py says what each means).
        device: where the model runs: "cpu", or "cuda" (the first) or "cuda:N" for a GPU of NVIDIA's.
        gpu_memory_utilization: fraction of a GPU's memory that weights, activations and the KV pool together may take; None takes
            0.9, or what kv_cache_bytes says.
        gemm: on a GPU, what multiplies: "mma", which None is, "wgmma" (bfloat16 on Hopper, the same bits) or "cublas" (a request's
            bits may then depend on its batch mates), or a mapping from the model's products (qkv, out, gate_up or up, down, head, "*" for the
            rest) to those.
        quantization: None, or "int8": weights per output channel, GEMM inputs per token; on the CPU.
        kv_cache_dtype: "float32", "bfloat16", or "auto": float32 where the arithmetic is.
        kv_cache_bytes: memory for the KV pool, taken at once; None takes what plan_memory finds sensible for this machine,
            page by page as it is used; on a GPU, what gpu_memory_utilization leaves, at once.
        max_num_seqs, max_num_batched_tokens: as NanoServingEngine's max_batch_size and max_num_batched_tokens. None: 32 sequences, on
            a GPU 256.
        max_model_len: longest prompt + output; None takes the model's, or what fits the pool.
        revision: branch, tag or commit of a hub repository.
        eos_token_id: token(s) that end a request; None takes the checkpoint's.
        on_load: called as (bytes done, bytes in total, weight name) while weights are packed.
        on_progress: called as (done, total, kernel name) while kernels compile.
        engine_options: of NanoServingEngine: page_size, max_chunk_size, policy, enable_prefix_cache, num_threads, seed,
            weight_cache. On a GPU num_threads and weight_cache are refused: there are none.

    Attributes:
        directory: where it was loaded from. config: its ModelConfig. precision: the number formats it computes in.
        memory_plan: what it takes of the device's memory.
        tokenizer: None when the checkpoint has none. chat_template: likewise.
        generation: the checkpoint's GenerationConfig. sampling_defaults: what it asks for, by SamplingParams field;
            default_params: as SamplingParams.

    Raises:
        CheckpointError: what is wrong with the checkpoint. ValueError: naming the field, its value and its limit.
        CudaDriverMissing: a GPU is asked for and there is no driver. KernelMissing: a GPU's kernel must be compiled, and no
            compiler is installed. OtherBits: wgmma is asked for, and does not sum as mma does on this GPU.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "auto",
        kv_cache_bytes: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        *,
        device: str = "cpu",
        gpu_memory_utilization: float | None = None,
        gemm: str | Mapping[str, str] | None = None,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        revision: str | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        on_load: OnProgress | None = None,
        on_progress: OnProgress | None = None,
        **engine_options: Any,
    ) -> None:
        # Refuse before anything is read.
        on_gpu = device_ordinal(device) is not None
        choose_precision(dtype, quantization, kv_cache_dtype, "f32", 2, gpu=on_gpu)
        if unknown := sorted(set(engine_options) - _ENGINE_OPTIONS):
            known = ", ".join(sorted(_ENGINE_OPTIONS))
            raise TypeError(f"{unknown[0]}: LLM has no such option; of the engine's it takes {known}")
        for_cpu = {name: engine_options.get(name) for name in ("num_threads", "weight_cache")}
        refuse_options(device, for_cpu, {"gpu_memory_utilization": gpu_memory_utilization, "gemm": gemm})
        gpu = self._open_gpu(device, kv_cache_bytes, gpu_memory_utilization) if on_gpu else None
        whole_number("max_num_batched_tokens", max_num_batched_tokens, 1, MAX_SLOTS)
        if max_num_seqs is None:
            max_num_seqs = min(32 if gpu is None else gpu.default_num_seqs, max_num_batched_tokens)
        self.directory = directory = checkpoint_directory(model, revision=revision)
        self.config = ModelConfig.from_pretrained(directory)
        # Before the weights: a bad tokenizer should not cost a minute's loading.
        self.tokenizer: AnyTokenizer | None = load_tokenizer(directory, self.config.vocab_size)
        self.chat_template = None if self.tokenizer is None else ChatTemplate.load(directory, self.tokenizer)
        self.generation = GenerationConfig.load(directory, self.config.vocab_size)
        self.sampling_defaults, self.default_params = self._sampling_defaults()
        tensors = load_weights(directory)
        bound = bind_weights(self.config, tensors)
        stored = stored_dtype(bound)
        self.precision = choose_precision(
            dtype, quantization, kv_cache_dtype, stored, self.config.dim_per_head, gpu=on_gpu
        )
        sizes: dict[str, Any] = {
            "kv_cache_bytes": kv_cache_bytes, "max_num_seqs": max_num_seqs, "max_model_len": max_model_len,
            "page_size": engine_options.get("page_size", 16), "max_num_batched_tokens": max_num_batched_tokens,
            "precision": self.precision,
        }  # fmt: skip
        if gpu is not None:
            gemm = "mma" if gemm is None else gemm
            self.memory_plan = gpu.plan_memory(
                self.config, bound, gpu_memory_utilization=gpu_memory_utilization, gemm=gemm, **sizes
            )
        else:
            weight_bytes = loaded_bytes(self.config, bound, self.precision)
            threads = engine_options.get("num_threads")
            self.memory_plan = plan_memory(
                self.config, weight_bytes=weight_bytes, num_threads=threads, **sizes
            )
        self.engine = NanoServingEngine(
            self.config,
            tensors,
            kv_cache_pages=self.memory_plan.num_pages,
            max_batch_size=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            precision=self.precision,
            device=device,
            gemm=gemm,
            eos_token_id=self._eos_token_ids() if eos_token_id is None else eos_token_id,
            on_load=on_load,
            on_progress=on_progress,
            **engine_options,
        )
        self._grammars = (
            None
            if self.tokenizer is None
            else GrammarCompiler(self.tokenizer, self.config.vocab_size, self.engine.eos_token_ids)
        )
        if kv_cache_bytes is not None:
            self.engine.kv_pool.populate()  # a first touch can cost more than the token that causes it

    @staticmethod
    def _open_gpu(device: str, kv_cache_bytes: int | None, utilization: float | None) -> CudaBackend:
        """The GPU of that name, once it is known that its memory can be divided."""
        from nanoserve.cuda.backend import open_device
        from nanoserve.cuda.memory_plan import utilization as checked

        checked(utilization, kv_cache_bytes)
        return open_device(device)

    def _sampling_defaults(self) -> tuple[dict[str, Any], SamplingParams]:
        asked = self.generation.defaults
        # A checkpoint that wants more tokens than max_tokens allows by default gets them.
        defaults = {"max_tokens": max(SamplingParams().max_tokens, asked.get("min_tokens", 0)), **asked}
        if self.generation.not_applied:
            warnings.warn(
                f"generation_config.json asks for {', '.join(self.generation.not_applied)}, which nanoserve does not do",
                stacklevel=3,
            )
        try:
            return defaults, SamplingParams(**defaults)
        except ValueError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error

    def _eos_token_ids(self) -> tuple[int, ...]:
        """generation_config.json's, as transformers ends by; else config.json's; else the tokenizer's."""
        named = self.generation.eos_token_ids or self.config.eos_token_ids
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return named or (() if own is None else (own,))

    @property
    def quantization_report(self) -> QuantizationReport | None:
        """How far the int8 weights are from the checkpoint's; None where nothing was quantised."""
        return self.engine.executor.quantization_report

    # ---- text

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete texts or token lists; outputs in prompt order. None samples as the checkpoint asks for.

        Raises:
            ValueError: naming the prompt, the field, its value and its limit; nothing was generated then.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else as_list("prompts", prompts)
        per_prompt = self._params(sampling_params, len(listed))
        jobs = []
        for index, (prompt, params) in enumerate(zip(listed, per_prompt, strict=True)):
            with _naming(f"prompts[{index}]"):
                jobs.append(self._text_request(prompt, params))
        return self._run(jobs)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[TextDelta]:
        """One prompt, as it is generated. Closing the iterator aborts the rest."""
        (params,) = self._params(sampling_params, 1)
        return self._deltas(self._text_request(prompt, params))

    # ---- messages

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next message in one conversation or several; outputs in their order.

        Args:
            messages: of one conversation, each with "role" and "content"; or a list of conversations.
            add_generation_prompt, tools: as ChatTemplate.render's.
            chat_template_kwargs: further variables of the template, as enable_thinking.

        Raises:
            ValueError: as generate, and what the template itself refuses.
        """
        listed = as_list("messages", messages)
        conversations = [listed] if not listed or isinstance(listed[0], Mapping) else listed
        per_prompt = self._params(sampling_params, len(conversations))
        options = _template_options(add_generation_prompt, tools, chat_template_kwargs)
        jobs = []
        for index, (one, params) in enumerate(zip(conversations, per_prompt, strict=True)):
            with _naming(f"conversations[{index}]") if len(conversations) > 1 else nullcontext():
                jobs.append(self._chat_request(one, params, options))
        return self._run(jobs)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[TextDelta]:
        """The assistant's next message, as it is generated. Closing the iterator aborts the rest. Arguments as chat's."""
        (params,) = self._params(sampling_params, 1)
        options = _template_options(add_generation_prompt, tools, chat_template_kwargs)
        return self._deltas(self._chat_request(messages, params, options))

    def _chat_request(
        self, messages: Sequence[Message], params: SamplingParams, options: Mapping[str, Any]
    ) -> TextRequest:
        if self.chat_template is None or self.tokenizer is None:
            raise ValueError(
                "messages: this checkpoint has no chat template, use generate with a prompt instead"
            )
        prompt = self.chat_template.render(messages, **options)
        tokens = self.tokenizer.encode(prompt, add_special_tokens=False)
        return self._text_request(prompt, params, tokens)

    # ---- requests

    def _text_request(
        self, prompt: Prompt, params: SamplingParams, prompt_tokens: Sequence[int] | None = None
    ) -> TextRequest:
        grammar = self.compile_grammar(params)
        return TextRequest(
            self.engine, self.tokenizer, prompt, params, prompt_tokens=prompt_tokens, grammar=grammar
        )

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """What a TextRequest needs for `params.structured_outputs`; None if they are None. Any thread may call it.

        Raises:
            ValueError: naming the field and what cannot be compiled.
        """
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise ValueError("structured_outputs: this checkpoint has no tokenizer to read them with")
        return self._grammars.compile(params.structured_outputs)

    # ---- tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens."""
        return self.get_tokenizer().encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.get_tokenizer().decode(tokens)

    def get_tokenizer(self) -> AnyTokenizer:
        """The checkpoint's tokenizer; a ValueError if it has none."""
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
        """Runs the engine until all jobs are finished, yielding after each step; whatever ends it early aborts the rest.

        Who ends a job does not matter: other callers' steps may, and so may an abort.
        """
        engine, growing, unfinished = self.engine, list(jobs), list(jobs)
        try:
            while True:
                while unfinished and unfinished[-1].is_finished:  # looking at one is enough to go on
                    unfinished.pop()
                if not unfinished:
                    break
                for job in growing:
                    for request in job.due():
                        engine.submit(request)
                growing = [job for job in growing if not job.is_all_submitted]
                engine.step()
                yield
        finally:
            for job in jobs:
                for request in job.requests:
                    if not request.is_finished:
                        engine.abort(request.req_id)


def _template_options(
    add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] | None, more: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {**(more or {}), "add_generation_prompt": add_generation_prompt, "tools": tools}


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says where what is refused inside stood."""
    try:
        yield
    except RequestRefused as error:
        raise RequestRefused(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error

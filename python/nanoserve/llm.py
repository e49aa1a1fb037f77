"""LLM: a checkpoint directory in, text out.

Text goes through the checkpoint's tokenizer; this version knows one, the byte-level tokenizer of models with a vocabulary of
256 and no tokenizer files (a token is a byte of UTF-8). Other checkpoints are served with token lists as prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoserve.cache.kv_pool import pages_for_budget
from nanoserve.errors import CheckpointError
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import load_weights
from nanoserve.nano_engine import NanoServingEngine, as_list
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams

_DEFAULT_KV_BYTES = 256 * 1024 * 1024
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a prompt became. `text` is None when the checkpoint has no tokenizer we know."""

    prompt: str | list[int]
    text: str | None
    token_ids: list[int]
    finish_reason: str
    error: str | None
    usage: Usage


class LLM:
    """A model ready to generate.

    Args:
        model: checkpoint directory (config.json and safetensors).
        dtype: "float32", the only one yet.
        kv_cache_bytes: memory for the KV pool.
        max_num_seqs, max_num_batched_tokens: as NanoServingEngine's max_batch_size and max_num_batched_tokens.
        max_model_len: longest prompt + output; None takes the model's.
        engine_options: further keywords of NanoServingEngine.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "float32",
        kv_cache_bytes: int = _DEFAULT_KV_BYTES,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        on_progress: Callable[[int, int, str], None] | None = None,
        **engine_options: Any,
    ) -> None:
        if dtype != "float32":
            raise ValueError(f"dtype: {dtype!r} is not supported, only 'float32'")
        if not Path(model).is_dir():
            raise CheckpointError(f"model: {model} must be a checkpoint directory")
        config = ModelConfig.from_pretrained(model)
        page_size = engine_options.setdefault("page_size", 16)
        pages = pages_for_budget(
            kv_cache_bytes,
            page_size=page_size,
            num_layers=config.n_layer,
            num_heads=config.kv_heads,
            head_dim=config.dim_per_head,
        )
        self.engine = NanoServingEngine(
            config,
            load_weights(model),
            kv_cache_pages=pages,
            max_batch_size=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            on_progress=on_progress,
            **engine_options,
        )
        has_tokenizer = any((Path(model) / name).exists() for name in _TOKENIZER_FILES)
        self._byte_level = config.vocab_size == 256 and not has_tokenizer

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete texts or token lists; outputs in prompt order.

        Raises:
            ValueError: naming the prompt, the field, its value and its limit.
        """
        listed: list[str | Sequence[int]] = (
            [prompts] if isinstance(prompts, str) else as_list("prompts", prompts)
        )
        finished = self.engine.generate(
            [self.encode(p) if isinstance(p, str) else p for p in listed], sampling_params
        )
        return [
            RequestOutput(
                prompt=prompt if isinstance(prompt, str) else request.prompt_tokens,
                text=self.decode(self._without_eos(request)) if self._byte_level else None,
                token_ids=list(request.output_tokens),
                finish_reason=str(request.finish_reason),
                error=request.error,
                usage=Usage(request.num_prompt_tokens, len(request.output_tokens), request.prefix_hit_len),
            )
            for prompt, request in zip(listed, finished, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        if not self._byte_level:
            raise ValueError(
                "prompts: this checkpoint's tokenizer is not supported yet, give token ids instead of text"
            )
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts: {text[:20]!r} is not valid Unicode text: {error.reason}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        if not self._byte_level:
            raise ValueError("tokens: this checkpoint's tokenizer is not supported yet")
        return bytes(tokens).decode("utf-8", errors="replace")

    def _without_eos(self, request: Request) -> list[int]:
        tokens = request.output_tokens
        ended = request.finish_reason == "stop" and not request.ignore_eos
        return tokens[:-1] if ended and tokens[-1] in self.engine.eos_token_ids else tokens

"""What is refused before it is queued: requests that could never be served.

A request that passed the door can always be finished alone in an empty engine. That is what lets the queue's head wait for
pages without a way around it, and what makes preemption end: see Scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.errors import RequestRefused
from nanoserve.request import Request


class Door:
    """The limits of one engine.

    Args:
        kv_pool: its pages are all a single request can ever get.
        max_model_len: longest prompt + output; None for no limit.
        vocab_size: token ids are below it; None when unknown.
        max_prompt_len: longest prompt that fits one batch; None when prompts are chunked.
    """

    def __init__(
        self,
        kv_pool: KVCachePool,
        max_model_len: int | None = None,
        vocab_size: int | None = None,
        max_prompt_len: int | None = None,
    ) -> None:
        self.kv_pool = kv_pool
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.max_prompt_len = max_prompt_len

    def max_kv_tokens(self, request: Request) -> int:
        """Tokens whose KV it may ever hold: all but its last, which is never computed."""
        longest = request.max_total_len
        if self.max_model_len is not None:
            longest = min(longest, self.max_model_len)
        return longest - 1

    def check(self, request: Request) -> None:
        """Raises RequestRefused with the numbers."""
        name = f"request {request.req_id!r}"
        length = request.num_prompt_tokens
        _check_text_is_resolved(name, request)
        if self.vocab_size is not None:
            _check_vocabulary(name, request, self.vocab_size)
        if self.max_model_len is not None and length >= self.max_model_len:
            raise RequestRefused(
                f"{name}: a prompt of {length} tokens leaves no room for output, prompt + output is at most "
                f"{self.max_model_len} tokens (the model's, or all that the pool's {self.kv_pool.num_pages} pages hold)"
            )
        if self.max_prompt_len is not None and length > self.max_prompt_len:
            raise RequestRefused(
                f"{name}: a prompt of {length} tokens does not fit one batch of {self.max_prompt_len} tokens and prompts "
                "are not chunked: use ChunkedPrefillManager"
            )
        tokens = self.max_kv_tokens(request)
        needed = self.kv_pool.pages_needed(tokens)
        if needed > self.kv_pool.num_pages:
            raise RequestRefused(
                f"{name}: {length} prompt tokens and max_tokens={request.max_tokens} need {needed} pages of "
                f"{self.kv_pool.page_size} tokens, the pool has {self.kv_pool.num_pages} pages"
            )
        if request.cached_len:
            raise RequestRefused(
                f"{name}: cached_len={request.cached_len}, but it holds no pages: cached prefixes are found here"
            )


def _check_text_is_resolved(name: str, request: Request) -> None:
    """Refuses what only somebody with a tokenizer can do, if nobody has."""
    params = request.params
    if params.stop and request.watcher is None:
        raise RequestRefused(
            f"{name}: stop: strings need a tokenizer, use LLM, or give the request a watcher"
        )
    if params.bad_words and not request.bad_word_ids:
        raise RequestRefused(
            f"{name}: bad_words: strings need a tokenizer, use LLM, or give the request bad_word_ids"
        )
    if params.structured_outputs is not None and request.constraint is None:
        raise RequestRefused(
            f"{name}: structured_outputs: needs a tokenizer, use LLM, or give the request a constraint"
        )
    if params.n > 1:
        raise RequestRefused(
            f"{name}: n: {params.n} must be 1: LLM fans out n, the engine serves one sequence per request"
        )


def _check_vocabulary(name: str, request: Request, vocab_size: int) -> None:
    """Refuses token ids the model does not know, wherever they stand."""
    params = request.params
    listed: list[tuple[str, Iterable[int]]] = [
        ("prompt_tokens", request.prompt_tokens),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias or ()),
    ]
    listed += [(f"bad_word_ids[{i}]", word) for i, word in enumerate(request.bad_word_ids)]
    for field, tokens in listed:
        if max(tokens, default=0) >= vocab_size:
            position, token = next((i, token) for i, token in enumerate(tokens) if token >= vocab_size)
            place = field if field == "logit_bias" else f"{field}[{position}]"  # a mapping has no positions
            raise RequestRefused(f"{name}: {place}: {token} must be in [0, {vocab_size})")

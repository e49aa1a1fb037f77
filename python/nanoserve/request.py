"""One request's life: what was asked, what has been computed, what came out.

Three lengths describe it at any moment, as half-open intervals over its token positions:

    [0 ........... cached_len)                 KV is in its pages: computed, or shared from the prefix cache
                  [cached_len ... total_len)   known tokens still to compute (`extend_len` of them)
    [0 ............................ total_len) prompt + output

Before the first output `extend_len` is prompt - cached; while decoding it is 1, the token just sampled; after a
preemption it is everything again. One formula serves all three, so no phase flag can disagree with it.

Only RequestPool changes `state`; `cached_len` moves with what is computed or found in the cache, never ahead of it.

A request knows tokens, not text. Who knows text (LLM, the server) gives it bad words as token sequences, a watcher, which
is called with every committed token, once and in order, and may end the request, and a constraint (constraint.py), which
says what tokens may come.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from nanoserve.checks import shown, whole_number
from nanoserve.constraint import Constraint
from nanoserve.logits_processors import LogitsProcessor
from nanoserve.logprobs import TokenLogprob
from nanoserve.sampling import SamplingParams

if TYPE_CHECKING:
    from nanoserve.native import PageTable


MAX_PRIORITY = 1000  # bounded, so that waiting is (policies.py)
MAX_BAD_WORD_IDS = 1024  # token sequences: a word has one per way to spell it
MAX_BAD_WORD_LEN = 1024  # tokens of one

Watcher = Callable[[int], str | None]


class RequestState(Enum):
    """Where a request is. The arrows between states are RequestPool's."""

    WAITING = "waiting"  # never admitted
    PREFILL = "prefill"  # admitted, prompt partly computed
    DECODE = "decode"  # one token per step
    PREEMPTED = "preempted"  # lost its pages, waits to be recomputed
    FINISHED = "finished"


class Request:
    """A prompt, its sampling parameters and its output so far.

    Args:
        req_id: unique among live requests.
        prompt_tokens: at least one token id, each 0 <= id < 2**31 (the model's vocabulary is checked at the engine).
        max_tokens, temperature, ignore_eos: shorthands for the fields of SamplingParams; `params` wins when given.
        cached_len: leading prompt tokens whose KV is already in pages; less than the prompt's length.
        priority: smaller runs earlier under the `priority` policy.
        bad_word_ids: token sequences the output must not have: `params.bad_words`, tokenized.
        cache_offset: added to the first token as the prefix cache knows it: requests share prefixes under one offset only.
        watcher: called with each committed token; a string ends the request, with finish_reason "stop" and that string
            as `stop_reason`, once there are more than min_tokens outputs. If it raises, its request fails.
        constraint: says which tokens may come: `params.structured_outputs`, compiled. If it raises, its request fails.

    Attributes:
        output_tokens: the output so far, the token that ended it included.
        finish_reason: "stop", "length", "abort" or "error"; None while it is live.
        stop_reason: the stop id or the watcher's string that ended it; None for EOS and for other endings.
        logprobs: one entry per output token if `params.logprobs` asks for them, else empty.
        prompt_logprobs: None for the first prompt token, then an entry for each; None if they were not asked for.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    __slots__ = (
        "arrival",
        "bad_word_ids",
        "cache_offset",
        "cached_len",
        "cached_prompt_tokens",
        "constraint",
        "error",
        "finish_reason",
        "logits_processor",
        "logprobs",
        "long_context",
        "max_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "output_tokens",
        "page_table",
        "params",
        "prefix_counted",
        "prefix_hit_len",
        "priority",
        "prompt_logprobs",
        "prompt_tokens",
        "radix_node",
        "req_id",
        "seed",
        "state",
        "stop_reason",
        "token_ids",
        "validated_len",
        "watcher",
    )

    def __init__(
        self,
        req_id: int | str,
        prompt_tokens: Sequence[int],
        max_tokens: int | None = None,
        temperature: float | None = None,
        ignore_eos: bool | None = None,
        cached_len: int = 0,
        *,
        params: SamplingParams | None = None,
        priority: int = 0,
        bad_word_ids: Sequence[Sequence[int]] = (),
        watcher: Watcher | None = None,
        constraint: Constraint | None = None,
        cache_offset: int = 0,
    ) -> None:
        if params is None:
            given: dict[str, Any] = {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "ignore_eos": ignore_eos,
            }
            params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
        self.req_id = req_id
        self.prompt_tokens = _checked_tokens(prompt_tokens)
        self.num_prompt_tokens = len(self.prompt_tokens)
        if not isinstance(req_id, int | str):
            raise ValueError(f"req_id: {shown(req_id)} must be an integer or a string")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params: {shown(params)} must be SamplingParams")
        # At least one prompt token is computed: somebody has to produce the logits.
        cached_len = whole_number(
            "cached_len", cached_len, 0, self.num_prompt_tokens - 1, "prompt length - 1 = "
        )
        self.params = params
        self.max_tokens = params.max_tokens
        self.priority = whole_number("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        self.cached_len = cached_len
        self.cache_offset = whole_number("cache_offset", cache_offset, 0, 2**31 - 1)
        self.prefix_hit_len = 0  # tokens the prefix cache gave at the latest admission
        self.cached_prompt_tokens = 0  # of the prompt, found at the first: later ones find its own work
        self.prefix_counted = False  # its first admission is in the cache statistics
        self.validated_len = (
            0  # leading tokens known to have led to finite logits: only these may enter the tree
        )
        self.output_tokens: list[int] = []
        self.token_ids = array("i", self.prompt_tokens)  # prompt + output, the copy that is sliced and hashed
        # Its KV has the rotary angles of long sequences (Rope.switch_len); changes only while it holds no pages.
        self.long_context = False
        self.page_table: PageTable | None = None
        self.radix_node: int | None = None  # the pinned node of the prefix tree
        self.state = RequestState.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.num_preemptions = 0
        self.arrival = -1  # set once by RequestPool: seniority, which a preemption keeps
        self.seed: int | None = params.seed  # replaced by the engine's stream when the user gave none
        self.bad_word_ids = _checked_words(bad_word_ids)
        if watcher is not None and not callable(watcher):
            raise ValueError(f"watcher: {shown(watcher)} must be callable")
        self.watcher = watcher
        self.constraint = constraint
        self.logits_processor = LogitsProcessor.of(params, self.bad_word_ids)
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )

    @property
    def total_len(self) -> int:
        """Prompt plus output tokens."""
        return len(self.token_ids)

    @property
    def extend_len(self) -> int:
        """Known tokens whose KV is still to be computed."""
        return len(self.token_ids) - self.cached_len

    @property
    def device_len(self) -> int:
        """Tokens whose KV is on the device once everything known so far is computed."""
        return self.cached_len + self.extend_len

    @property
    def max_total_len(self) -> int:
        """Prompt plus the most output it may get."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def kv_pages(self) -> list[int]:
        """Physical pages held, in token order."""
        return [] if self.page_table is None else list(self.page_table.pages)

    def cache_key(self, num_tokens: int | None = None) -> array[int]:
        """The first tokens as the prefix cache knows them; None: all.

        The first token sets everything below it in the tree apart: by its offset, for those who must not find each other's
        prefixes; by its complement, negative and so nobody else's, for long contexts: KV is the tokens' only under the same
        rotary angles.
        """
        key = self.token_ids[:num_tokens]
        if key:
            first = key[0] + self.cache_offset
            key[0] = ~first if self.long_context else first
        return key

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Some of the prompt's log-probabilities that were asked for are not known yet."""
        known = self.prompt_logprobs
        return known is not None and len(known) < self.num_prompt_tokens

    def prompt_logprob_rows(self, start: int, count: int) -> range:
        """Of the positions [start, start + count) those whose logits give a missing entry of `prompt_logprobs`.

        The row at a position tells of the next token, so the last prompt position is none of them.
        """
        if self.prompt_logprobs is None:
            return range(0)
        known = len(self.prompt_logprobs)
        return range(max(start, known - 1), min(start + count, self.num_prompt_tokens - 1))

    @property
    def temperature(self) -> float:
        return self.params.temperature

    @property
    def ignore_eos(self) -> bool:
        return self.params.ignore_eos

    def append_output(self, token: int) -> None:
        """Commit one sampled token."""
        self.output_tokens.append(token)
        self.token_ids.append(token)

    def __repr__(self) -> str:
        return (
            f"Request({self.req_id!r}, {self.state.value}, prompt={self.num_prompt_tokens}, "
            f"output={len(self.output_tokens)}, cached={self.cached_len})"
        )


def _checked_tokens(tokens: Sequence[int]) -> list[int]:
    if (
        isinstance(tokens, str | bytes)
        or not hasattr(tokens, "__len__")
        or not hasattr(tokens, "__getitem__")
    ):
        raise ValueError(f"prompt_tokens: {shown(tokens)} must be a sequence of token ids")
    if not len(tokens):
        raise ValueError("prompt_tokens: empty, at least one token is needed")
    if all(type(token) is int for token in tokens) and min(tokens) >= 0 and max(tokens) < 2**31:
        return list(tokens)
    return [whole_number(f"prompt_tokens[{i}]", token, 0, 2**31 - 1) for i, token in enumerate(tokens)]


def _checked_words(words: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    if isinstance(words, str | bytes) or not isinstance(words, Sequence):
        raise ValueError(f"bad_word_ids: {shown(words)} must be a sequence of token sequences")
    if len(words) > MAX_BAD_WORD_IDS:
        raise ValueError(
            f"bad_word_ids: {len(words)} token sequences, at most {MAX_BAD_WORD_IDS} are allowed"
        )
    checked = []
    for i, word in enumerate(words):
        name = f"bad_word_ids[{i}]"
        if isinstance(word, str | bytes) or not isinstance(word, Sequence) or not word:
            raise ValueError(f"{name}: {shown(word)} must be a sequence of token ids that is not empty")
        if len(word) > MAX_BAD_WORD_LEN:
            raise ValueError(f"{name}: {len(word)} tokens, at most {MAX_BAD_WORD_LEN} are allowed")
        checked.append(
            tuple(whole_number(f"{name}[{j}]", token, 0, 2**31 - 1) for j, token in enumerate(word))
        )
    return tuple(checked)

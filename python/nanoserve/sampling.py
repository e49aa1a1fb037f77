"""What a user may ask of the sampler: every field works, or its value is refused by name with its limit.

Meanings are vLLM's where nothing else is said. The parameters know nothing of tokenizers: `stop`, `bad_words` and
`structured_outputs` are about text, and whoever has the tokenizer (LLM, the server) turns them into a Request's `watcher`,
`bad_word_ids` and `constraint`. How the
numbers become a token is sampler.py's part, with logits_processors.py and random_stream.py below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from nanoserve.checks import shown, truth, whole_number
from nanoserve.random_stream import child_seed, derive_seed, mix64, random_bits, uniform
from nanoserve.structured import StructuredOutputs

if TYPE_CHECKING:
    from nanoserve.sampler import Sampler

__all__ = ["Sampler", "SamplingParams", "child_seed", "derive_seed", "mix64", "random_bits", "uniform"]

MAX_TOKENS = 2**31 - 1  # positions are int32
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0  # presence and frequency, either sign
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # a factor and its inverse
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_IDS = 256
MAX_BAD_WORDS = 256
MAX_TEXT = 256  # characters of one stop string or bad word
MAX_LOGPROBS = 20
MAX_N = 128


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample and when to stop.

    Args:
        temperature: 0 is greedy, at most 100.
        top_k: keep the k likeliest tokens; 0 (or -1) keeps all.
        top_p: keep the likeliest tokens until their mass reaches p.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        max_tokens: most output tokens.
        min_tokens: EOS and stop ids are not sampled, and stop strings not heeded, before this many output tokens.
        stop: strings that end the request when the output's text has them; one string or several.
        stop_token_ids: sampled, they end the request.
        ignore_eos: EOS neither ends the request nor is held back by min_tokens.
        seed: of this request's own random stream; None lets the engine choose.
        presence_penalty: subtracted from the logit of every token that is in the output.
        frequency_penalty: subtracted once for each time a token is in the output.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt or output.
        logit_bias: added to the logits of these token ids.
        logprobs: report each output token's log-probability and those of this many likeliest tokens.
        n: sequences per prompt.
        include_stop_str_in_output: the text ends with the stop string instead of before it.
        bad_words: words whose tokens the output must not have in a row, as the tokenizer writes them at the start of a text
            and after a space: the last of them is not sampled. The same letters in other tokens are not found.
        prompt_logprobs: as logprobs, for the prompt's tokens.
        skip_special_tokens: the text leaves special tokens out.
        structured_outputs: the form the text must have. It then ends (EOS, stop ids) only where it is complete, and at once
            where nothing can follow, min_tokens or not; stop strings and max_tokens may still cut it.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: str | Sequence[str] = ()  # stored as a tuple
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # stored as a dict of its own
    logprobs: int | None = None
    n: int = 1
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] = ()
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._check_real("temperature", 0.0, MAX_TEMPERATURE)
        self._check_int("top_k", -1, MAX_TOKENS)
        object.__setattr__(self, "top_k", max(0, self.top_k))
        self._check_real("top_p", 0.0, 1.0, above=True)
        self._check_real("min_p", 0.0, 1.0)
        self._check_int("max_tokens", 1, MAX_TOKENS)
        self._check_int("min_tokens", 0, self.max_tokens, "max_tokens = ")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_texts("stop", MAX_STOP_STRINGS)
        self._check_stop_ids()
        self._check_real("presence_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._check_real("frequency_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._check_real("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        self._check_bias()
        self._check_texts("bad_words", MAX_BAD_WORDS)
        self._check_int("n", 1, MAX_N)
        for name, high in (
            ("seed", 2**64 - 1),
            ("logprobs", MAX_LOGPROBS),
            ("prompt_logprobs", MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                self._check_int(name, 0, high)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            truth(name, getattr(self, name))
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise ValueError(
                f"structured_outputs: {shown(self.structured_outputs)} must be StructuredOutputs"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_filters(self) -> bool:
        """Some tokens may be cut off before the draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_penalties(self) -> bool:
        """Some logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def _check_real(self, name: str, low: float, high: float, above: bool = False) -> None:
        object.__setattr__(self, name, _real(name, getattr(self, name), low, high, above))

    def _check_int(self, name: str, low: int, high: int, high_name: str = "") -> None:
        object.__setattr__(self, name, whole_number(name, getattr(self, name), low, high, high_name))

    def _check_texts(self, name: str, most: int) -> None:
        texts: Any = getattr(self, name)
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise ValueError(f"{name}: {shown(texts)} must be a sequence of strings that are not empty")
        if len(texts) > most:
            raise ValueError(f"{name}: {len(texts)} strings, at most {most} are allowed")
        for i, text in enumerate(texts):
            if len(text) > MAX_TEXT:
                raise ValueError(
                    f"{name}[{i}]: {shown(text)} has {len(text)} characters, at most {MAX_TEXT} are allowed"
                )
        object.__setattr__(self, name, tuple(texts))

    def _check_stop_ids(self) -> None:
        ids: Any = self.stop_token_ids
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise ValueError(f"stop_token_ids: {shown(ids)} must be a sequence of token ids")
        if len(ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids: {len(ids)} ids, at most {MAX_STOP_IDS} are allowed")
        checked = (whole_number(f"stop_token_ids[{i}]", token, 0, MAX_TOKENS) for i, token in enumerate(ids))
        object.__setattr__(self, "stop_token_ids", tuple(checked))

    def _check_bias(self) -> None:
        bias: Any = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, Mapping):
            raise ValueError(f"logit_bias: {shown(bias)} must map token ids to numbers")
        if len(bias) > MAX_BIASED_TOKENS:
            raise ValueError(f"logit_bias: {len(bias)} entries, at most {MAX_BIASED_TOKENS} are allowed")
        checked = {}
        for token, value in bias.items():
            token = whole_number("logit_bias", token, 0, MAX_TOKENS)
            checked[token] = _real(f"logit_bias[{token}]", value, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "logit_bias", checked)


def _real(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    limit = f"{'(' if above else '['}{low:g}, {high:g}]"
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise ValueError(f"{name}: {shown(value)} must be a number in {limit}")
    if not low <= value <= high or (above and value == low):  # a NaN fails the first
        raise ValueError(f"{name}: {shown(value)} must be in {limit}")
    return float(value)


def __getattr__(name: str) -> Any:
    """`Sampler`, when it is asked for: it needs the native module, the parameters do not."""
    if name != "Sampler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanoserve.sampler import Sampler

    return Sampler

"""A prompt as the text layer sees it: `n` engine requests, each with its own text, and the result they add up to.

It queues nothing and runs nothing: whoever drives the engine submits what `due` returns. The first sequence goes alone until
its prompt is computed; the others then find that prompt in the prefix cache instead of computing it n times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanoserve.checks import shown
from nanoserve.nano_engine import NanoServingEngine
from nanoserve.outputs import Completion, RequestOutput, TextDelta, Usage
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams, child_seed
from nanoserve.text.byte_tokenizer import ByteTokenizer
from nanoserve.text.grammar import Grammar
from nanoserve.text.text_output import TextOutput
from nanoserve.text.tokenizer import Tokenizer

AnyTokenizer = Tokenizer | ByteTokenizer
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(slots=True)
class _Sequence:
    request: Request
    text: TextOutput | None  # None: the checkpoint has no tokenizer
    streamed: int = 0  # tokens that deltas have told of
    has_ended: bool = False  # and the end


class TextRequest:
    """One prompt, text or token ids, on its way through an engine.

    Args:
        prompt: as the user gave it: a text, tokenized with the tokenizer's special tokens; token ids; or, as vLLM has it,
            {"prompt": text} or {"prompt_token_ids": ids}.
        prompt_tokens: its tokens where they are known already (a rendered chat template).
        grammar: of `params.structured_outputs`, compiled (GrammarCompiler).
        priority, cache_space: as NanoServingEngine.prepare's.

    Raises:
        ValueError: a bad prompt or parameter. RequestRefused: it can never fit.
    """

    def __init__(
        self,
        engine: NanoServingEngine,
        tokenizer: AnyTokenizer | None,
        prompt: Prompt,
        params: SamplingParams,
        *,
        prompt_tokens: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        priority: int = 0,
        cache_space: int = 0,
    ) -> None:
        self.prompt = _unwrapped(prompt)
        if prompt_tokens is None:
            prompt_tokens = _tokens(tokenizer, self.prompt)
        self.params = params
        if (grammar is None) != (params.structured_outputs is None):
            raise ValueError(
                "grammar: must be given with structured_outputs, compiled of them, and not without"
            )
        bad_words = _bad_word_ids(tokenizer, params.bad_words)
        hidden = set() if params.ignore_eos else set(engine.eos_token_ids)
        hidden.update(params.stop_token_ids)
        if params.include_stop_str_in_output:
            hidden.clear()
        self._sequences: list[_Sequence] = []
        for index in range(params.n):
            own = params
            if params.n > 1:
                seed = None if params.seed is None else child_seed(params.seed, index)
                wants_prompt = params.prompt_logprobs if index == 0 else None
                own = replace(params, n=1, seed=seed, prompt_logprobs=wants_prompt)
            text = None
            if tokenizer is not None:
                text = TextOutput(
                    tokenizer, stop=params.stop, include_stop=params.include_stop_str_in_output,
                    skip_special_tokens=params.skip_special_tokens, min_tokens=params.min_tokens, hidden_ids=hidden,
                )  # fmt: skip
            request = engine.prepare(
                prompt_tokens, own, bad_word_ids=bad_words,
                watcher=None if text is None else text.push, constraint=None if grammar is None else grammar.matcher(),
                priority=priority, cache_space=cache_space,
            )  # fmt: skip
            self._sequences.append(_Sequence(request, text))
        self._submitted = 0

    @property
    def requests(self) -> list[Request]:
        """One per sequence."""
        return [sequence.request for sequence in self._sequences]

    @property
    def is_finished(self) -> bool:
        return all(sequence.request.is_finished for sequence in self._sequences)

    @property
    def is_all_submitted(self) -> bool:
        """`due` has nothing more to give."""
        return self._submitted == len(self._sequences)

    def due(self) -> list[Request]:
        """The requests to submit now; each is returned once."""
        first = self._sequences[0].request
        if self._submitted == 0:
            self._submitted = 1
            return [first]
        if first.output_tokens or first.is_finished:
            rest = self.requests[self._submitted :]
            for index, request in enumerate(rest, start=self._submitted):
                if request.seed is None and first.seed is not None:
                    # Not the engine's next: when this happens depends on what else runs, and an answer must not.
                    request.seed = child_seed(first.seed, index)
            self._submitted = len(self._sequences)
            return rest
        return []

    def deltas(self) -> list[TextDelta]:
        """What is new since the last call, a delta per sequence that has something new."""
        new = []
        for index, sequence in enumerate(self._sequences):
            request, text = sequence.request, sequence.text
            seen, tokens = sequence.streamed, request.output_tokens[sequence.streamed :]
            ends = request.is_finished and not sequence.has_ended
            if not tokens and not ends:
                continue
            sequence.streamed, sequence.has_ended = len(request.output_tokens), ends
            piece = "" if text is None else text.finish() if ends else text.take()
            reason = _ending(sequence)[0] if ends else None
            logprobs = None if request.params.logprobs is None else request.logprobs[seen:]
            new.append(TextDelta(index, piece, tokens, logprobs, reason))
        if new and self.is_finished:
            new[-1] = replace(new[-1], output=self.result())
        return new

    def stop_reason(self, index: int) -> int | str | None:
        """What ended a finished sequence: a stop string or token, None for EOS and other endings."""
        return _ending(self._sequences[index])[1]

    def result(self) -> RequestOutput:
        """Everything, once all sequences are finished."""
        requests = self.requests
        usage = Usage(
            requests[0].num_prompt_tokens,
            sum(len(request.output_tokens) for request in requests),
            requests[0].cached_prompt_tokens,
        )
        prompt = self.prompt if isinstance(self.prompt, str) else list(requests[0].prompt_tokens)
        outputs = [_completion(index, sequence) for index, sequence in enumerate(self._sequences)]
        return RequestOutput(
            prompt, list(requests[0].prompt_tokens), outputs, usage, requests[0].prompt_logprobs
        )


def _unwrapped(prompt: Prompt) -> str | Sequence[int]:
    if not isinstance(prompt, Mapping):
        return prompt
    if len(prompt) != 1 or set(prompt) - {"prompt", "prompt_token_ids"}:
        raise ValueError(
            f"prompt: {shown(dict(prompt))} must have either prompt or prompt_token_ids, and nothing else"
        )
    (value,) = prompt.values()
    if isinstance(value, str) != ("prompt" in prompt):
        raise ValueError(
            f"{next(iter(prompt))}: {shown(value)} must be {'text' if 'prompt' in prompt else 'token ids'}"
        )
    unwrapped: str | Sequence[int] = value
    return unwrapped


def _tokens(tokenizer: AnyTokenizer | None, prompt: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("prompts: this checkpoint has no tokenizer, give token ids instead of text")
    return tokenizer.encode(prompt)


def _completion(index: int, sequence: _Sequence) -> Completion:
    request, text = sequence.request, sequence.text
    if text is not None:
        text.finish()
    reason, stop_reason = _ending(sequence)
    return Completion(
        index=index,
        text=None if text is None else text.text,
        token_ids=list(request.output_tokens),
        finish_reason=reason,
        stop_reason=stop_reason,
        logprobs=None if request.params.logprobs is None else list(request.logprobs),
        error=request.error,
    )


def _ending(sequence: _Sequence) -> tuple[str, int | str | None]:
    """Finish and stop reason; a stop string that only the end of the output completed ended it, too."""
    request, text = sequence.request, sequence.text
    if request.finish_reason == "length" and text is not None and text.stop_string is not None:
        return "stop", text.stop_string
    return str(request.finish_reason), request.stop_reason


def _bad_word_ids(tokenizer: AnyTokenizer | None, words: Sequence[str]) -> list[list[int]]:
    """Token sequences of words, at the beginning of a text and after a space, as vLLM reads them."""
    if words and tokenizer is None:
        raise ValueError("bad_words: this checkpoint has no tokenizer to find their tokens with")
    found: list[list[int]] = []
    for word in words:
        assert tokenizer is not None
        spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (word, " " + word.lstrip())]
        if not any(spellings):
            raise ValueError(f"bad_words: {shown(word)} has no tokens in this tokenizer")
        found += [ids for ids in spellings if ids and ids not in found]
    return found

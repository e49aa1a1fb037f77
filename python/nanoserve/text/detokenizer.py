"""Generated token ids to text, append-only.

Invariants:
  - what was returned is final: concat(push(token) for all) + finish() == tokenizer.decode(all), for any ids;
  - half a character is never returned: U+FFFD comes only when its bytes can never become a character, or at finish();
  - a token costs the same wherever it stands: nothing is decoded twice.

How the text relates to what the `tokenizers` library decodes from the whole list is said in decoder.py.
"""

from __future__ import annotations

from typing import Protocol

from nanoserve.checks import shown
from nanoserve.text.decoder import Decoder


class TokenSource(Protocol):
    """The part of a tokenizer that turns ids into strings."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    def token_string(self, token: int) -> str | None:
        """How the vocabulary spells a token; None for an id of the model that the tokenizer does not have."""


class IncrementalDetokenizer:
    """One request's text, token by token.

    Args:
        skip_special_tokens: special tokens contribute nothing.
    """

    __slots__ = ("_skipped", "_stream", "_tokenizer")

    def __init__(self, tokenizer: TokenSource, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.decoder.stream()
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()

    def push(self, token: int) -> str:
        """The text that is final with this token; empty while a character is incomplete.

        Raises:
            ValueError: the id is outside the model's vocabulary.
        """
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(f"token: {shown(token)} must be in [0, {self._tokenizer.vocab_size - 1}]")
        if token in self._skipped:
            return ""
        string = self._tokenizer.token_string(token)
        return "" if string is None else self._stream.push(string)

    def finish(self) -> str:
        """The text held back, at the end of the output."""
        return self._stream.finish()

"""One request's text: detokenizer and stop strings together.

    token --> IncrementalDetokenizer --> StopStrings --> released text, taken by the caller

Invariant: released text is final. `text` only grows, and the concatenation of everything take() returned is `text`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nanoserve.checks import whole_number
from nanoserve.text.detokenizer import IncrementalDetokenizer, TokenSource
from nanoserve.text.stop_strings import StopStrings


class TextOutput:
    """Called once per generated token; knows when a stop string ends the request.

    Args:
        stop: stop strings.
        include_stop: the text keeps the stop string that ended it.
        skip_special_tokens: special tokens contribute no text.
        min_tokens: the text of this many tokens is not searched for stop strings: it just flows, and a stop string that
            begins in it is not seen.
        hidden_ids: tokens that contribute no text, as the EOS that ends a request.
    """

    def __init__(
        self,
        tokenizer: TokenSource,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        hidden_ids: Collection[int] = frozenset(),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
        self._stops = StopStrings(stop, include_stop)
        self._min_tokens = whole_number("min_tokens", min_tokens, 0)
        self._hidden_ids = frozenset(hidden_ids)
        self._num_detokenized = 0  # characters, those held back by the stop strings included
        self._offsets: list[int] = []
        self._parts: list[str] = []
        self._taken = 0
        self._is_finished = False

    def push(self, token_id: int) -> str | None:
        """The stop string that ends the request with this token, or None.

        Raises:
            ValueError: the id is outside the model's vocabulary.
        """
        self._offsets.append(self._num_detokenized)
        if token_id not in self._hidden_ids:
            self._add(self._detokenizer.push(token_id))
        return self._stops.matched

    def take(self) -> str:
        """The text released since the last take."""
        new = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        return new

    def finish(self) -> str:
        """Release what was held back, at the end of the output; returns what take() would. More calls change nothing.

        A stop string that only the held back text completes cuts the text too: `stop_string` tells.
        """
        if not self._is_finished:
            self._is_finished = True
            self._add(self._detokenizer.finish())
            self._parts.append(self._stops.finish())
        return self.take()

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._parts)

    @property
    def stop_string(self) -> str | None:
        """The stop string found, if any."""
        return self._stops.matched

    @property
    def token_offsets(self) -> list[int]:
        """For every pushed token where its text begins in `text`; for tokens behind the cut, the text's length."""
        length = len(self.text)
        return [min(offset, length) for offset in self._offsets]

    def _add(self, text: str) -> None:
        self._num_detokenized += len(text)
        if len(self._offsets) > self._min_tokens:
            text, _ = self._stops.push(text)
        if text:
            self._parts.append(text)

"""Stop strings in a text that arrives in pieces.

Definition: reading the text character by character, the stop string that is complete first wins; of several complete at the
same character the longest. The text is cut where it begins (or, with `include`, where it ends). So the verdict depends on
the characters read so far and on nothing else: not on how they were cut into tokens, and never on text that is still to
come. Of two stop strings where one begins with the other, the shorter always wins.

Text that may turn out to be the beginning of a stop string is held back; everything before it is released at once. Every
stop string has its own matching automaton (Knuth, Morris, Pratt 1977): constant time per character and stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoserve.checks import shown


class StopStrings:
    """Watches one text.

    Args:
        stops: strings that are not empty.
        include: release the matched stop string too.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop: {shown(stops)} must be a sequence of strings that are not empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched_len = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be released now, the stop string that is complete or None). After a match: ("", the match)."""
        if self.matched is not None:
            return "", self.matched
        if not self._stops:
            return text, None
        for i, char in enumerate(text):
            winner = self._advance(char)
            if winner is not None:
                self.matched = winner
                end = len(self._held) + i + 1
                released = (self._held + text)[: end if self._include else end - len(winner)]
                self._held = ""
                return released, winner
        text = self._held + text
        keep = max(self._matched_len)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """The text held back: it was not the beginning of a stop string after all."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        winner: str | None = None
        for i, stop in enumerate(self._stops):
            length = self._matched_len[i]
            borders = self._borders[i]
            while length and stop[length] != char:
                length = borders[length - 1]
            length += stop[length] == char
            self._matched_len[i] = length
            if length == len(stop) and (winner is None or len(stop) > len(winner)):
                winner = stop
        return winner


def _borders(stop: str) -> list[int]:
    """borders[i]: length of the longest proper prefix of stop[: i + 1] that is also its suffix."""
    borders = [0]
    for char in stop[1:]:
        length = borders[-1]
        while length and stop[length] != char:
            length = borders[length - 1]
        borders.append(length + (stop[length] == char))
    return borders

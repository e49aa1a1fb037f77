"""Token strings to text, one token at a time: the streaming form of the `tokenizers` library's decoders.

The library decodes a whole list of tokens. A server needs what one more token adds, in constant time, without ever taking
text back. Decoding again a window of the last tokens, as servers usually do, costs a window per token and is wrong wherever
a decoder looks at a token's place (a leading space, the first word) or holds a character back. So every decoder is written
here as a stage that keeps the state it needs, and a tokenizer's decoder is a chain of stages.

    token strings --> stage --> stage --> ... --> text

Invariant: for every chain and every token sequence, join(push(t) for t in tokens) + finish() is what the library's decode()
gives, with one exception, by nature. ByteFallback: the library looks at a whole run of byte tokens (<0xE4><0xBD>...) and if
any part of it is not UTF-8, turns every byte of the run into U+FFFD, characters that were complete included. A stream has
sent those already. Here complete characters stay, and each remaining byte becomes one U+FFFD. Both agree for every run that
is valid, and for every run without a complete character (the usual one: a character cut off by max_tokens).
The engine's non-streaming text comes from this same code, so the two ways to ask for a text never differ.

Price: 200 lines that must follow the library. The tests compare each stage with the library's on random tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex
from tokenizers import decoders as library

from nanoserve.text.byte_level import bytes_of_token

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # the sign is the library's leniency


class Stage(ABC):
    """One decoder of a chain, with its state for one text."""

    fuses = False  # its output is one long token in pieces, no longer a list of tokens

    @abstractmethod
    def push(self, token: str) -> list[str]:
        """One token (or, behind a stage that fuses, one more piece) in; those that are final now out."""

    def finish(self) -> list[str]:
        """What was held back."""
        return []


class Fuse(Stage):
    fuses = True

    def push(self, token: str) -> list[str]:
        return [token]


class ByteLevel(Stage):
    """Tokens are bytes in disguise; an invalid sequence becomes one U+FFFD, as Unicode recommends."""

    fuses = True

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        return [self._utf8.decode(bytes_of_token(token))]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", True)]


class ByteFallback(Stage):
    """Tokens <0x00> to <0xFF> are bytes; see the module's docstring for runs that are not UTF-8."""

    def __init__(self) -> None:
        self._pending = bytearray()  # the beginning of a character: at most 3 bytes

    def push(self, token: str) -> list[str]:
        match = _BYTE_TOKEN.fullmatch(token)
        if match is None:
            return [*self.finish(), token]
        self._pending.append(int(match[1], 16))
        out = []
        while self._pending:
            try:
                out.append(self._pending.decode("utf-8"))
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                out += [REPLACEMENT] * error.end  # the pending bytes begin with it: error.start is 0
                del self._pending[: error.end]
            else:
                self._pending.clear()
        return out

    def finish(self) -> list[str]:
        held = [REPLACEMENT] * len(self._pending)
        self._pending.clear()
        return held


class Metaspace(Stage):
    """The replacement character is a space, and nothing in the first token unless no space was prepended."""

    def __init__(self, replacement: str, prepended: bool) -> None:
        self._replacement = replacement
        self._drop = prepended

    def push(self, token: str) -> list[str]:
        space = "" if self._drop else " "
        self._drop = False
        return [token.replace(self._replacement, space)]


class WordPiece(Stage):
    """A token continues a word if it has the prefix, else it begins one after a space."""

    _CLEANUP = (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
        (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    )  # fmt: skip

    def __init__(self, prefix: str, cleanup: bool) -> None:
        self._prefix = prefix
        self._cleanup = cleanup
        self._first = True

    def push(self, token: str) -> list[str]:
        if not self._first:
            token = token.removeprefix(self._prefix) if token.startswith(self._prefix) else " " + token
        self._first = False
        if self._cleanup:
            for old, new in self._CLEANUP:
                token = token.replace(old, new)
        return [token]


class WordEnd(Stage):
    """BPEDecoder: a suffix marks the end of a word, a space except after the last token. Holds one token back."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None

    def push(self, token: str) -> list[str]:
        out = [] if self._held is None else [self._held.replace(self._suffix, " ")]
        self._held = token
        return out

    def finish(self) -> list[str]:
        return [] if self._held is None else [self._held.replace(self._suffix, "")]


class SpaceJoin(Stage):
    """No decoder: tokens with spaces between."""

    fuses = True

    def __init__(self) -> None:
        self._first = True

    def push(self, token: str) -> list[str]:
        out = token if self._first else " " + token
        self._first = False
        return [out]


class ReplaceInTokens(Stage):
    """Replace within each token, by the library itself: its regular expressions are not Python's."""

    def __init__(self, pattern: str | Regex, content: str) -> None:
        self._replace = library.Replace(pattern, content)

    def push(self, token: str) -> list[str]:
        return [self._replace.decode([token])]


class ReplaceInText(Stage):
    """Replace a string in a fused text: holds back what may be the pattern's beginning."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._held = ""

    def push(self, token: str) -> list[str]:
        *done, rest = (self._held + token).split(self._pattern)
        keep = min(len(rest), len(self._pattern) - 1)
        while keep and not self._pattern.startswith(rest[-keep:]):
            keep -= 1
        self._held = rest[len(rest) - keep :]
        return [self._content.join([*done, rest[: len(rest) - keep]])]

    def finish(self) -> list[str]:
        return [self._held]


class ReplaceAtEnd(Stage):
    """Replace a regular expression in a fused text: how far a match reaches is known at the end only, so all of it waits."""

    def __init__(self, pattern: Regex, content: str) -> None:
        self._replace = library.Replace(pattern, content)
        self._parts: list[str] = []

    def push(self, token: str) -> list[str]:
        self._parts.append(token)
        return []

    def finish(self) -> list[str]:
        return [self._replace.decode(["".join(self._parts)])]


class StripTokens(Stage):
    """Cut up to `start` leading and `stop` trailing characters `content` off each token."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop

    def push(self, token: str) -> list[str]:
        lead = min(self._start, len(token) - len(token.lstrip(self._content)))
        token = token[lead:]
        trail = min(self._stop, len(token) - len(token.rstrip(self._content)))
        return [token[: len(token) - trail]]


class StripText(Stage):
    """The same for a fused text: counts at its beginning, holds back what may be its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._held = ""

    def push(self, token: str) -> list[str]:
        if self._start and token:
            lead = min(self._start, len(token) - len(token.lstrip(self._content)))
            self._start = self._start - lead if lead == len(token) else 0
            token = token[lead:]
        text = self._held + token
        keep = min(self._stop, len(text) - len(text.rstrip(self._content)))
        self._held = text[len(text) - keep :]
        return [text[: len(text) - keep]]


class Decoder:
    """A tokenizer's decoder: makes a DecoderStream for every text.

    Args:
        spec: the `decoder` object of tokenizer.json as the library writes it; None joins tokens with spaces.

    Raises:
        ValueError: a decoder that has no streaming form.
    """

    def __init__(self, spec: dict[str, Any] | None) -> None:
        self._stages: list[Callable[[], Stage]] = []
        self.is_byte_level = False
        self.has_byte_tokens = False
        self._fused = False
        self._add({"type": "SpaceJoin"} if spec is None else spec)

    @classmethod
    def of_library(cls, decoder: library.Decoder | None) -> Decoder:
        """From the library's object, which knows the default of every field a file leaves out."""
        return cls(None if decoder is None else json.loads(decoder.__getstate__()))

    def stream(self) -> DecoderStream:
        return DecoderStream([make() for make in self._stages])

    def token_bytes(self, token: str) -> bytes:
        """What one token contributes in the middle of a text, as UTF-8; for byte tokens exactly its bytes."""
        if self.is_byte_level:
            return bytes_of_token(token)
        match = _BYTE_TOKEN.fullmatch(token) if self.has_byte_tokens else None
        if match is not None:
            return bytes([int(match[1], 16)])
        # Between two tokens that are like any word: neither the first token's rules nor the last one's apply.
        before, after = self._text(["a"]), self._text(["a", "a"])
        text = self._text(["a", token, "a"])
        return text.removeprefix(before).removesuffix(after.removeprefix(before)).encode("utf-8")

    def _text(self, tokens: Sequence[str]) -> str:
        stream = self.stream()
        return "".join(map(stream.push, tokens)) + stream.finish()

    def _add(self, spec: dict[str, Any]) -> None:
        kind = spec["type"]
        if kind == "Sequence":
            for part in spec["decoders"]:
                self._add(part)
            return
        if self._fused and kind in ("ByteFallback", "Metaspace", "WordPiece", "BPEDecoder"):
            raise ValueError(f"{kind} behind a decoder that joins all tokens is not supported")
        if kind == "ByteLevel":
            self.is_byte_level = not self._stages
        self.has_byte_tokens |= kind == "ByteFallback"
        make = self._factory(kind, spec)
        self._stages.append(make)
        self._fused |= make().fuses

    def _factory(self, kind: str, spec: dict[str, Any]) -> Callable[[], Stage]:
        simple: dict[str, type[Stage]] = {
            "ByteLevel": ByteLevel,
            "ByteFallback": ByteFallback,
            "Fuse": Fuse,
            "SpaceJoin": SpaceJoin,
        }
        if kind in simple:
            return simple[kind]
        if kind == "Metaspace":
            return lambda: Metaspace(spec["replacement"], spec["prepend_scheme"] != "never")
        if kind == "WordPiece":
            return lambda: WordPiece(spec["prefix"], spec["cleanup"])
        if kind == "BPEDecoder":
            return lambda: WordEnd(spec["suffix"])
        if kind == "Strip":
            strip = StripText if self._fused else StripTokens
            return lambda: strip(spec["content"], spec["start"], spec["stop"])
        if kind == "Replace":
            pattern = _pattern(spec["pattern"])
            if not self._fused:
                return lambda: ReplaceInTokens(pattern, spec["content"])
            if isinstance(pattern, str):
                return lambda: ReplaceInText(pattern, spec["content"])
            return lambda: ReplaceAtEnd(pattern, spec["content"])
        raise ValueError(f"{kind} has no streaming form")


def _pattern(spec: dict[str, str]) -> str | Regex:
    (kind, text), *_ = spec.items()
    if not text:
        raise ValueError("Replace with an empty pattern")
    return text if kind == "String" else Regex(text)


class DecoderStream:
    """One text in the making."""

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = stages

    def push(self, token: str) -> str:
        """The text that this token makes final."""
        return self._through(0, [token])

    def finish(self) -> str:
        """The text that was held back."""
        return "".join(self._through(i + 1, stage.finish()) for i, stage in enumerate(self._stages))

    def _through(self, first: int, tokens: list[str]) -> str:
        for stage in self._stages[first:]:
            tokens = [out for token in tokens for out in stage.push(token)]
        return "".join(tokens)

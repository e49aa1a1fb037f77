"""Every streaming decoder stage against the library's decoder of the same name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from nanoserve.text.byte_level import BYTE_TO_CHAR
from nanoserve.text.decoder import Decoder, DecoderStream

SPACE = "\u2581"
CHAINS: dict[str, Any] = {
    "byte level": decoders.ByteLevel(),
    "fuse": decoders.Fuse(),
    "metaspace": decoders.Metaspace(),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece no cleanup": decoders.WordPiece(prefix="@@", cleanup=False),
    "word end": decoders.BPEDecoder(),
    "replace": decoders.Replace(SPACE, " "),
    "replace pattern": decoders.Replace(Regex("[a-c]+"), "-"),
    "strip left": decoders.Strip(" ", 2, 0),
    "replace, fuse, strip": decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "strip left of text": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "strip right of text": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 2)]),
    "replace in text": decoders.Sequence([decoders.Fuse(), decoders.Replace("aab", "<>")]),
    "replace twice": decoders.Sequence([decoders.Fuse(), decoders.Replace("aa", "a"), decoders.Replace(" ", "")]),
    "pattern in text": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+b"), "x")]),
    "bytes then text": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("ab", "")]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.Replace(SPACE, " ")]), decoders.Sequence([decoders.Fuse()])]),
}  # fmt: skip
PIECES = ["a", "aa", "aab", "b", " ", "  ", " a", "a ", SPACE, SPACE + "a", "##b", "@@b", "b</w>", "</w>", ".", "'s", "n't",
          "do not", "é", "你", "👋", BYTE_TO_CHAR[0x20] + "x", BYTE_TO_CHAR[0xE4], BYTE_TO_CHAR[0xBD] + BYTE_TO_CHAR[0xA0],
          BYTE_TO_CHAR[0xF0] + BYTE_TO_CHAR[0x9F], BYTE_TO_CHAR[0xFF], "\ufffd", "x y"]  # fmt: skip
tokens = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=9)


def streamed(chain: Any, pieces: list[str]) -> str:
    stream = Decoder.of_library(chain).stream()
    return "".join(map(stream.push, pieces)) + stream.finish()


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=150)
@given(pieces=tokens)
@example(pieces=[" ", " a", " "])
@example(pieces=["", "  ", " "])
def test_stage_equals_library(name: str, pieces: list[str]) -> None:
    if name in ("word end", "strip right of text"):
        pieces = ["zz", *pieces]  # the library panics where there is less than it wants to cut
    assert streamed(CHAINS[name], pieces) == CHAINS[name].decode(pieces)


def test_no_decoder_joins_with_spaces() -> None:
    assert streamed(None, ["a", "b", "", "c"]) == "a b  c"


# ---- byte fallback: the one stage that differs, and exactly how

FALLBACK = decoders.ByteFallback()


def byte_tokens(data: bytes) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in data]


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def by_definition(run: bytes) -> str:
    """Complete characters stay, every other byte is one U+FFFD."""
    text, rest = "", run
    while rest:
        size = next((n for n in range(1, 5) if len(rest) >= n and is_utf8(rest[:n])), 0)
        text += rest[:size].decode() if size else "\ufffd"
        rest = rest[size or 1 :]
    return text


runs = st.lists(
    st.one_of(st.text(max_size=3).map(lambda s: s.encode("utf-8", "ignore")), st.binary(max_size=4)),
    max_size=4,
).map(b"".join)


@settings(max_examples=400)
@given(parts=st.lists(st.tuples(runs, st.sampled_from(["x", "你", "", "<0xZZ>", "<0x1>"])), max_size=4))
@example(parts=[("你".encode()[:2], "x")])
@example(parts=[("你".encode() + b"\xff", "x")])
def test_byte_runs(parts: list[tuple[bytes, str]]) -> None:
    pieces, expected = [], ""
    for run, word in parts:
        pieces += [*byte_tokens(run), word]
        expected += by_definition(run) + word
    assert streamed(FALLBACK, pieces) == expected
    if all(is_utf8(run) or not any(is_utf8(run[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(run) - n + 1))
           for run, _ in parts):  # fmt: skip
        assert FALLBACK.decode(pieces) == expected, (
            "a run that is valid, or holds no character, is the library's"
        )


def test_where_the_library_takes_text_back() -> None:
    """The exception of decoder.py's docstring: complete characters of an invalid run."""
    pieces = byte_tokens("你".encode() + b"\xff")
    assert FALLBACK.decode(pieces) == "\ufffd" * 4
    assert streamed(FALLBACK, pieces) == "你\ufffd"


# ---- shapes and refusals


@pytest.mark.parametrize(
    ("chain", "word"),
    [
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]), "Metaspace"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), "ByteFallback"),
    ],
)
def test_refuses_what_has_no_streaming_form(chain: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Decoder.of_library(chain)


@pytest.mark.parametrize(
    ("chain", "token", "expected"),
    [
        (decoders.ByteLevel(), BYTE_TO_CHAR[0xE4], b"\xe4"),
        (decoders.ByteLevel(), "Ġa", b" a"),
        (decoders.ByteLevel(), "x y", b"x y"),
        (CHAINS["replace, fuse, strip"], SPACE + "a", b" a"),
        (decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]), "<0xE4>", b"\xe4"),
        (decoders.Metaspace(), SPACE + "a", b" a"),
        (decoders.WordPiece(), "##b", b"b"),
        (decoders.WordPiece(), "b", b" b"),
        (decoders.BPEDecoder(), "b</w>", b"b "),
        (None, "b", b" b"),
    ],
)  # fmt: skip
def test_token_bytes_in_the_middle_of_a_text(chain: Any, token: str, expected: bytes) -> None:
    assert Decoder.of_library(chain).token_bytes(token) == expected


def test_streams_share_nothing() -> None:
    decoder = Decoder.of_library(decoders.Metaspace())
    first, second = decoder.stream(), decoder.stream()
    assert isinstance(first, DecoderStream)
    assert first.push(SPACE + "a") == "a"
    assert second.push(SPACE + "b") == "b"
    assert first.push(SPACE + "c") == " c"

"""Incremental text: equal to the whole, append-only, never half a character, constant time per token."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve.text import ByteTokenizer, IncrementalDetokenizer, load_tokenizer
from support.tokenizers_small import KINDS, make_tokenizer
from support.unicode_text import texts

VOCAB = 400
ALL = (*KINDS, "bytes")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made: dict[str, Any] = {"bytes": ByteTokenizer()}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        make_tokenizer(kind, directory, VOCAB)
        made[kind] = load_tokenizer(directory, VOCAB)
    return made


def pieces_of(tokenizer: Any, ids: list[int], skip: bool) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip)
    return [*map(stream.push, ids), stream.finish()]


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=120)
@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=24), skip=st.booleans())
def test_any_ids(tokenizers: dict[str, Any], kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = tokenizers[kind]
    ids = [token % tokenizer.vocab_size for token in ids]
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=120)
@given(text=texts(), skip=st.booleans(), cut=st.integers(0, 60))
def test_text_and_its_prefixes(
    tokenizers: dict[str, Any], kind: str, text: str, skip: bool, cut: int
) -> None:
    """What came out before any token is a prefix of the final text, and holds no U+FFFD the final text lacks."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    pieces = pieces_of(tokenizer, ids, skip)
    assert "".join(pieces) == whole
    before = "".join(pieces[: min(cut, len(ids))])
    assert whole.startswith(before)
    unknown = kind in ("unigram", "wordpiece") or "<0x" in text
    assert unknown or whole.count("\ufffd") == text.count("\ufffd"), (
        "no half characters, and those of the text stay"
    )


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "gpt2-prefix", "qwen2", "llama3", "llama2", "gemma"])
@settings(max_examples=80)
@given(text=texts())
def test_round_trip(tokenizers: dict[str, Any], kind: str, text: str) -> None:
    """A lossless tokenizer gives the text back, whole and streamed."""
    tokenizer = tokenizers[kind]
    if kind == "qwen2":
        import unicodedata

        text = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = "".join(pieces_of(tokenizer, ids, False))
    if kind == "gpt2-prefix":
        streamed, text = streamed.removeprefix(" "), text.removeprefix(" ")
    if kind in ("llama2", "gemma"):  # a SentencePiece vocabulary has one character for both
        streamed, text = streamed.replace("\u2581", " "), text.replace("\u2581", " ")
    specials = [tokenizer.token_string(i) for i in tokenizer.special_ids]
    if not any(special in text for special in specials):  # an added token swallows what is around it
        assert streamed == text or "<0x" in text


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "llama2", "unigram-bytes"])
@pytest.mark.parametrize("char", ["é", "你", "👋", "\U0010ffff"])
def test_a_character_in_bytes_comes_out_whole(tokenizers: dict[str, Any], kind: str, char: str) -> None:
    tokenizer = tokenizers[kind]
    by_bytes = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    data = char.encode()
    ids = [by_bytes[bytes([byte])] for byte in data]
    assert pieces_of(tokenizer, ids, True) == [*[""] * (len(data) - 1), char, ""]
    # Cut off: nothing until the end, then U+FFFD. Interrupted: U+FFFD as soon as it is certain.
    assert pieces_of(tokenizer, ids[:-1], True)[:-1] == [""] * (len(data) - 1)
    assert set(pieces_of(tokenizer, ids[:-1], True)[-1]) == {"\ufffd"}
    interrupted = pieces_of(tokenizer, [*ids[:-1], by_bytes[b"A"]], True)
    assert interrupted[-2].endswith("A")
    assert set(interrupted[-2][:-1]) == {"\ufffd"}
    assert interrupted[-1] == ""


def test_special_tokens_in_the_middle_of_a_character(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["gpt2"]
    by_bytes = {tokenizer.token_bytes(i): i for i in reversed(range(VOCAB))}
    first, second = (by_bytes[bytes([byte])] for byte in "é".encode())
    special = tokenizer.eos_token_id
    assert pieces_of(tokenizer, [first, special, second], True) == ["", "", "é", ""]
    assert pieces_of(tokenizer, [first, special, second], False) == ["", "\ufffd<|endoftext|>", "\ufffd", ""]


def test_a_replacement_character_of_the_text_is_not_held_back(tokenizers: dict[str, Any]) -> None:
    """Engines that wait for U+FFFD to go away freeze here."""
    tokenizer = tokenizers["bytes"]
    pieces = pieces_of(tokenizer, tokenizer.encode("\ufffdab"), True)
    assert pieces == ["", "", "\ufffd", "a", "b", ""]


@pytest.mark.parametrize("kind", ALL)
def test_spaces_are_kept_at_every_cut(tokenizers: dict[str, Any], kind: str) -> None:
    """A window that begins at a word would lose its space."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog", add_special_tokens=False)
    assert (
        "".join(pieces_of(tokenizer, ids, True)).split()
        == "the quick brown fox jumps over the lazy dog".split()
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "wordpiece"])
def test_time_per_token_does_not_grow(tokenizers: dict[str, Any], kind: str) -> None:
    """60,000 tokens: the last third takes no longer than the first, give or take the machine."""
    tokenizer = tokenizers[kind]
    ids = (tokenizer.encode("the quick brown fox 12345 miles", add_special_tokens=False) * 60_000)[:60_000]
    stream = IncrementalDetokenizer(tokenizer)
    seconds = []
    for start in range(0, 60_000, 20_000):
        begin = time.thread_time()
        for token in ids[start : start + 20_000]:
            stream.push(token)
        seconds.append(time.thread_time() - begin)
    assert seconds[2] < 3 * seconds[0] + 0.05


def test_bad_ids(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    for kind in ALL:
        stream = IncrementalDetokenizer(tokenizers[kind])
        for token in (-1, tokenizers[kind].vocab_size, 2**63):
            with pytest.raises(ValueError, match="token: "):
                stream.push(token)

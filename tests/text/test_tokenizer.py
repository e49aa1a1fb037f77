"""Tokenizer against transformers' AutoTokenizer on the same files; special tokens; what is refused, and how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanoserve.text import ByteTokenizer, Tokenizer, load_tokenizer
from support.tokenizers_small import KINDS, SPECIAL, make_tokenizer, special_texts
from support.unicode_text import texts

VOCAB = 400
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, directory in made.items():
        make_tokenizer(kind, directory, VOCAB)
    return made


@pytest.fixture(scope="module")
def pairs(directories: dict[str, Path]) -> dict[str, tuple[Any, Tokenizer]]:
    made = {}
    for kind, directory in directories.items():
        ours = load_tokenizer(directory, VOCAB)
        assert isinstance(ours, Tokenizer)
        made[kind] = (AutoTokenizer.from_pretrained(directory), ours)
    return made


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(text=texts())
def test_encode_equals_transformers(pairs: dict[str, Any], kind: str, text: str) -> None:
    theirs, ours = pairs[kind]
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=24), skip=st.booleans())
def test_decode_equals_transformers(pairs: dict[str, Any], kind: str, ids: list[int], skip: bool) -> None:
    """For any ids, unless a run of byte tokens is not UTF-8 as a whole (decoder.py says what happens then)."""
    theirs, ours = pairs[kind]
    if ours.decoder.has_byte_tokens:
        ids = _with_valid_byte_runs(ours, ids, skip)
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def _with_valid_byte_runs(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[int]:
    """Every byte token becomes the bytes of a character, chosen by it."""
    first = next(i for i in range(VOCAB) if tokenizer.token_string(i) == "<0x00>")
    out = []
    for token in ids:
        if first <= token < first + 256:
            out += [first + byte for byte in "aé你👋\n\ufffd"[token % 6].encode()]
        else:
            out.append(token)
    return out


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(text=texts())
def test_decode_of_a_text_equals_transformers(pairs: dict[str, Any], kind: str, text: str) -> None:
    theirs, ours = pairs[kind]
    text = text.replace("<0x", "")  # a byte token spelled out is half a character to some
    ids = ours.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(pairs: dict[str, Any], kind: str) -> None:
    theirs, ours = pairs[kind]
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.is_byte_level == (kind in ("gpt2", "gpt2-prefix", "qwen2", "llama3"))
    assert ours.vocab_size == VOCAB


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_add_up(pairs: dict[str, Any], kind: str) -> None:
    """The bytes of tokens in the middle of a text are the text's."""
    _, ours = pairs[kind]
    text = "the quick brown fox" if kind in ("wordpiece", "unigram") else "the quick 你好 👋 don't"
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)).decode().strip() == text
    assert [ours.token_text(i) for i in ids] == [ours.token_bytes(i).decode("utf-8", "replace") for i in ids]


def test_token_bytes_are_exact_for_bytes(pairs: dict[str, Any]) -> None:
    for kind in ("gpt2", "llama3", "llama2", "gemma", "unigram-bytes"):
        _, ours = pairs[kind]
        single = {ours.token_bytes(i) for i in range(VOCAB)}
        assert {bytes([byte]) for byte in range(256)} <= single, kind


def test_ids_the_tokenizer_lacks_are_no_text(directories: dict[str, Path]) -> None:
    """A padded vocabulary: the model has more ids than the tokenizer."""
    ours = load_tokenizer(directories["gpt2"], VOCAB + 100)
    assert ours is not None
    assert ours.token_bytes(VOCAB + 50) == b""
    assert ours.decode([40, VOCAB + 50, 41]) == ours.decode([40, 41])


# ---- text that is refused


@pytest.mark.parametrize("bad", ["\ud800", "a\udfff", 5, None, b"x", ["a"]])
def test_bad_text(pairs: dict[str, Any], bad: Any) -> None:
    for tokenizer in (pairs["gpt2"][1], ByteTokenizer()):
        with pytest.raises(ValueError, match="text:"):
            tokenizer.encode(bad)


def test_text_length_limit(pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoserve.text.input_text.MAX_TEXT_BYTES", 10)
    ours = pairs["gpt2"][1]
    assert ours.encode("a" * 10)
    for text in ("a" * 11, "é" * 6):
        with pytest.raises(ValueError, match="at most 10"):
            ours.encode(text)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_ids_outside_the_vocabulary(pairs: dict[str, Any], token: int) -> None:
    for tokenizer in (pairs["gpt2"][1], ByteTokenizer()):
        with pytest.raises(ValueError, match="token: "):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="token: "):
        pairs["gpt2"][1].token_bytes(token)


def test_a_token_the_model_lacks(directories: dict[str, Path]) -> None:
    ours = load_tokenizer(directories["wordpiece"], 200)
    assert ours is not None
    with pytest.raises(ValueError, match="vocabulary ends at 199"):
        ours.encode("quick brown fox")


def test_interrupts_are_not_swallowed(pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Backend:
        failure: type[BaseException] = KeyboardInterrupt

        def encode(self, *args: Any, **kwargs: Any) -> Any:
            raise self.failure("boom")

    ours = pairs["gpt2"][1]
    monkeypatch.setattr(ours, "_backend", Backend())
    with pytest.raises(KeyboardInterrupt):
        ours.encode("x")
    Backend.failure = PanicException
    with pytest.raises(ValueError, match="text: the tokenizer failed"):
        ours.encode("x")


@settings(max_examples=100)
@given(text=texts())
def test_byte_tokenizer(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(max_examples=200)
@given(data=st.binary(max_size=20))
def test_byte_tokenizer_decodes_anything(data: bytes) -> None:
    assert ByteTokenizer().decode(data) == data.decode("utf-8", "replace")


def test_factory_keeps_its_promises(directories: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        config = json.loads((directories[kind] / "tokenizer_config.json").read_text())
        assert {name: config[name] for name in SPECIAL[kind]} == SPECIAL[kind]
        assert special_texts(kind)
    small = make_tokenizer("llama2", tmp_path, 300)
    assert len(small) <= 300

"""One request's text: what is released and when, stop strings, hidden tokens, offsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve.text import ByteTokenizer, TextOutput, load_tokenizer
from support.tokenizers_small import make_tokenizer
from support.unicode_text import texts

BYTES = ByteTokenizer()


def drive(output: TextOutput, ids: Any) -> tuple[list[str], str | None]:
    """(what take() gave after each token and finish() at the end, the verdict); stops at the verdict as an engine does."""
    taken: list[str] = []
    verdict = None
    for token in ids:
        verdict = output.push(token)
        taken.append(output.take())
        if verdict is not None:
            break
    taken.append(output.finish())
    return taken, verdict


@settings(max_examples=200)
@given(
    text=texts(), stops=st.lists(st.sampled_from(["x", "lo", " wor", "好", "\n", "👋", "\ufffd"]), max_size=3)
)
def test_stream_equals_whole(text: str, stops: list[str]) -> None:
    streamed = TextOutput(BYTES, stop=stops)
    taken, verdict = drive(streamed, text.encode())
    whole = TextOutput(BYTES, stop=stops)
    for token in text.encode():
        whole.push(token)
    assert whole.finish() == "".join(taken) == streamed.text == whole.text
    assert streamed.stop_string == verdict
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    cut = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    assert streamed.text == cut


def test_verdict_comes_with_the_token_that_completes_the_stop() -> None:
    output = TextOutput(BYTES, stop=["END"])
    assert [output.push(token) for token in b"aENDb"] == [None, None, None, "END", "END"]
    assert output.text == "a"
    assert output.finish() == "a"
    assert output.stop_string == "END"


def test_include_stop() -> None:
    assert drive(TextOutput(BYTES, stop=["END"], include_stop=True), b"aENDb") == (
        ["a", "", "", "END", ""],
        "END",
    )


def test_holds_back_and_releases() -> None:
    output = TextOutput(BYTES, stop=["END"])
    assert drive(output, b"aEN!") == (["a", "", "", "EN!", ""], None)
    assert drive(TextOutput(BYTES, stop=["END"]), b"aEN") == (["a", "", "", "EN"], None)


@pytest.mark.parametrize(
    ("min_tokens", "verdicts", "text"),
    [
        (0, [None, "ab"], ""),
        (2, [None, None, None, None, "ab"], "aba"),  # "ab" spans an ignored token and a counted one: not seen
        (1, [None, None, None, "ab"], "ab"),  # the first token is not searched: its "a" begins nothing
        (99, [None] * 6, "ababxx"),
    ],
)
def test_min_tokens(min_tokens: int, verdicts: list[str | None], text: str) -> None:
    data = b"ababxx" if min_tokens != 2 else b"abaab"
    output = TextOutput(BYTES, stop=["ab"], min_tokens=min_tokens)
    got = []
    for token in data:
        got.append(output.push(token))
        if got[-1] is not None:
            break
    output.finish()
    assert got == verdicts
    assert output.text == text


def test_hidden_ids_have_no_text(tmp_path: Path) -> None:
    make_tokenizer("qwen2", tmp_path)
    tokenizer = load_tokenizer(tmp_path, 400)
    assert tokenizer is not None
    eos = tokenizer.eos_token_id
    assert eos is not None
    ids = [*tokenizer.encode("hello"), eos]
    for skip, hidden, expected in [
        (True, set(), "hello"), (False, set(), "hello<|im_end|>"), (False, {eos}, "hello"),
    ]:  # fmt: skip
        output = TextOutput(tokenizer, skip_special_tokens=skip, hidden_ids=hidden)
        drive(output, ids)
        assert output.text == expected


def test_finish_releases_half_a_character_once() -> None:
    output = TextOutput(BYTES)
    assert drive(output, b"a\xf0\x9f") == (["a", "", "", "\ufffd"], None)
    assert output.finish() == ""
    assert output.text == "a\ufffd"


def test_finish_can_complete_a_stop_string() -> None:
    output = TextOutput(BYTES, stop=["\ufffd"])
    assert drive(output, b"a\xf0\x9f") == (["a", "", "", ""], None)
    assert output.stop_string == "\ufffd"
    assert output.text == "a"


def test_take_is_exactly_the_new_text() -> None:
    output = TextOutput(BYTES)
    output.push(0x61)
    output.push(0x62)
    assert (output.take(), output.take()) == ("ab", "")
    output.push(0x63)
    assert output.finish() == "c"
    assert output.text == "abc"


def test_token_offsets() -> None:
    output = TextOutput(BYTES, stop=["END"])
    for token in "a你bEND".encode():
        output.push(token)
    output.finish()
    assert output.text == "a你b"
    assert output.token_offsets == [0, 1, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_bad_min_tokens(value: Any) -> None:
    with pytest.raises(ValueError, match="min_tokens"):
        TextOutput(BYTES, min_tokens=value)


def test_bad_token() -> None:
    with pytest.raises(ValueError, match="token: 256"):
        TextOutput(BYTES).push(256)

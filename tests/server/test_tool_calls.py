"""Tool calls out of text: any pieces give the same parts, and nothing a model said is lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoserve.server.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCall,
    ToolCallParser,
    ToolFormat,
    tool_format,
)

CALL = '{"name": "add", "arguments": {"a": 1, "text": "</b> [é]"}}'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1}}'
TEXTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<tool", "_call>", "\n", " ", "text", CALL, LLAMA_CALL, "[TOOL_CALLS]", f"[{CALL}]",
         '{"name": ', "{", "<", "[", "é"]
    ), max_size=8,
).map("".join)  # fmt: skip


def parts(form: ToolFormat, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser(form)
    made = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    return "".join(part for part in made if isinstance(part, str)), [
        part for part in made if isinstance(part, ToolCall)
    ]


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=lambda form: form.name)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=10))
def test_any_pieces_give_the_same_parts(form: ToolFormat, text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert parts(form, pieces) == parts(form, [text]) == parts(form, list(text))


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=lambda form: form.name)
@given(text=TEXTS)
def test_text_without_calls_comes_out_as_it_is(form: ToolFormat, text: str) -> None:
    said, calls = parts(form, [text])
    if not calls:
        assert said == text
    assert len(said) + sum(len(call.name) for call in calls) <= len(text)


@pytest.mark.parametrize(
    ("form", "text", "said", "names"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", ["add"]),
        (HERMES, f"I will.\n\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "I will.", ["add", "add"]),
        (HERMES, "<tool_call>{not json}</tool_call> so", "<tool_call>{not json}</tool_call> so", []),
        (HERMES, f"<tool_call>{CALL}", "", ["add"]),  # cut off behind a whole call
        (HERMES, '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
        (HERMES, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", ["add", "add"]),
        (MISTRAL, f"[TOOL_CALLS]{CALL}", "", ["add"]),
        (LLAMA, LLAMA_CALL, "", ["add"]),
        (LLAMA, f"  \n{LLAMA_CALL}", "", ["add"]),
        (LLAMA, f"Like {LLAMA_CALL}", f"Like {LLAMA_CALL}", []),
        (LLAMA, '{"name": "add"', '{"name": "add"', []),
    ],
)  # fmt: skip
def test_formats(form: ToolFormat, text: str, said: str, names: list[str]) -> None:
    assert parts(form, [text])[0] == said
    assert [call.name for call in parts(form, [text])[1]] == names


def test_arguments_are_json_text() -> None:
    (call,) = parts(HERMES, [f"<tool_call>{CALL}</tool_call>"])[1]
    assert json.loads(call.arguments) == {"a": 1, "text": "</b> [é]"}


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.push("Hello, <b") == ["Hello, <b"]
    assert parser.push(" <too") == []
    assert parser.push("th") == [" <tooth"]


def test_formats_are_found_in_templates() -> None:
    assert tool_format("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert tool_format("{% if tools %}[TOOL_CALLS]{% endif %}") is MISTRAL
    assert tool_format('{% for t in tools %}{"name": "", "parameters": {}}{% endfor %}') is LLAMA
    assert tool_format("<tool_call> {{ messages }}") is None
    assert tool_format("{{ tools }}") is None


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "-Infinity", '{"\\udfff": 1}'])
def test_what_is_no_json_text_is_no_call(value: str) -> None:
    """Half of a surrogate pair cannot be sent, and NaN not be parsed: what a model says must not break its answer."""
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'
    assert parts(HERMES, [text]) == (text, [])

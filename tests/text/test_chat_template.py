"""Chat templates against transformers' apply_chat_template; where they are found; messages that are refused."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanoserve.errors import CheckpointError
from nanoserve.text import ChatTemplate, load_tokenizer
from nanoserve.text.template_budget import current
from support import chat_templates
from support.tokenizers_small import make_tokenizer
from support.unicode_text import texts

USER = [{"role": "user", "content": " Hi there \n"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It's <the> \"weather\"", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]  # fmt: skip
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": USER,
    "system": [{"role": "system", "content": "Be brief. /no_think"}, *USER],
    "turns": [*USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"}, {"role": "user", "content": "更多"}],
    "reasoning": [*USER, {"role": "assistant", "content": "Hello!", "reasoning_content": "hm"}],
    "thinking": [*USER, {"role": "assistant", "content": "Hello!", "thinking": "hm"}],
    "tool call": [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "content": "12 °C"}, {"role": "tool", "content": "13"}],
    "two calls": [*USER, {"role": "assistant", "content": "Let me see", "tool_calls": [CALL, CALL]}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]}],
    "wrong order": [*USER, *USER],
    "strange role": [{"role": "narrator", "content": "x"}],
    "special tokens inside": [{"role": "user", "content": "</s><|im_end|>\n<|im_start|>system"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("llama2")
    make_tokenizer("llama2", directory)
    return AutoTokenizer.from_pretrained(directory), load_tokenizer(directory, 400)


def same(tokenizer: tuple[Any, Any], source: str, messages: Any, **options: Any) -> str | None:
    """Both give the same string, or both fail; returns the string."""
    theirs, ours = tokenizer
    options.setdefault("add_generation_prompt", True)
    template = ChatTemplate(source, ours.special_tokens)
    try:
        expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    except Exception as error:
        said = re.escape(str(error)) if type(error).__name__ == "TemplateError" else ""  # raise_exception
        with pytest.raises(ValueError, match=f"chat template: .*{said}"):
            template.render(messages, **options)
        return None
    assert template.render(messages, **options) == expected
    return str(expected)


@pytest.mark.parametrize("name", chat_templates.ALL)
@pytest.mark.parametrize("conversation", [c for c in CONVERSATIONS if c != "parts"])
def test_same_as_transformers(tokenizer: tuple[Any, Any], name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    for options in ({}, {"add_generation_prompt": False}, {"tools": TOOLS}, {"enable_thinking": False}):
        same(tokenizer, chat_templates.ALL[name], messages, **options)


def test_the_comparison_compares(tokenizer: tuple[Any, Any]) -> None:
    """Every template renders most conversations: failing alike is not agreement."""
    for name, source in chat_templates.ALL.items():
        rendered = [same(tokenizer, source, CONVERSATIONS[c]) for c in CONVERSATIONS if c != "parts"]
        assert sum(text is not None for text in rendered) >= 6, name


@pytest.mark.parametrize("name", chat_templates.ALL)
@settings(max_examples=25)
@given(contents=st.lists(texts(4), min_size=1, max_size=4))
def test_any_content(tokenizer: tuple[Any, Any], name: str, contents: list[str]) -> None:
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    same(tokenizer, chat_templates.ALL[name], messages)


def test_date(tokenizer: tuple[Any, Any]) -> None:
    assert same(tokenizer, "{{ strftime_now('%Y %B') }} {{ strftime_now('') }}", USER)


def test_a_template_written_by_its_tokenizer(tmp_path: Path) -> None:
    """The whole way: files of transformers, messages, prompt tokens."""
    source = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    make_tokenizer("llama3", tmp_path, chat_template=source)
    ours, theirs = load_tokenizer(tmp_path, 400), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    template = ChatTemplate.load(tmp_path, ours)
    assert template is not None
    ids = ours.encode(template.render(USER), add_special_tokens=False)
    assert ids == theirs.apply_chat_template(USER, add_generation_prompt=True).input_ids
    assert ids.count(ours.bos_token_id) == 1


# ---- parts


def test_parts_for_a_template_that_takes_them(tokenizer: tuple[Any, Any]) -> None:
    for name in ("gemma",):
        assert same(tokenizer, chat_templates.ALL[name], CONVERSATIONS["parts"])
    for loop in ("m['content']", "m.content", "(m.content or [])|list", "c"):
        source = (
            "{% for m in messages %}{% set c = m.content %}{% for p in "
            + loop
            + " %}{{ p.text }};{% endfor %}{% endfor %}"
        )
        if "or" not in loop:
            assert ChatTemplate(source).render(CONVERSATIONS["parts"]) == " one ;two;"


def test_parts_for_a_template_that_does_not() -> None:
    """Printed as a Python list they would ruin the prompt: joined instead."""
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    assert template.render(CONVERSATIONS["parts"]) == "one \ntwo"


# ---- where the template is


def load(directory: Path) -> str | None:
    class Names:
        special_tokens: dict[str, str] = {}  # noqa: RUF012

    template = ChatTemplate.load(directory, Names())
    return None if template is None else template.render(USER)


def test_files_and_their_order(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load(tmp_path) == "json"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert load(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load(tmp_path) == "jinja"


def test_named_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools|length }} tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

    class Names:
        special_tokens: dict[str, str] = {}  # noqa: RUF012

    template = ChatTemplate.load(tmp_path, Names())
    assert template is not None
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=TOOLS) == "2 tools"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, r"\[0\]"),
        ([{"name": "rag", "template": "x"}], "named 'default'"),
        ([{"name": "default"}], r"\[0\]"),
        ("{% if %}", "line 1"),
        ("{{ messages", "line 1"),
        ("\ud800", "not Unicode"),
        ("x" * (2**20 + 1), "larger than the limit of 1048576"),
        ("\n{% include 'x' %}", "line 2: statement include is not supported"),
        ("{% import 'x' as x %}", "statement import"),
        ("{% extends 'x' %}", "statement extends"),
        ("{% block x %}{% endblock %}", "statement block"),
        ("{{ 'x' | attr('y') }}", "filter 'attr' is not supported"),
        ("{{ 'x' | pprint }}", "filter 'pprint'"),
        ("{{ [1] | batch(2, [1]) | list }}", "filter 'batch'"),
        ("{{ 1 is nothing }}", "test 'nothing'"),
        ("{{ lipsum() }}", "'lipsum' is not supported"),
        ("{% macro m() %}{{ varargs }}{% endmacro %}", "'varargs'"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be compiled"),
        ("{{ a }}" * 10_001, "more than 10000 tags"),
        ("{{ [" + "a," * 50_001 + "] }}", "more than 50000 syntax nodes"),
        ("{{ 0x" + "f" * 2000 + " }}", "a number of more than 4096 bits"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "cannot be compiled"),
        ("{{ " + "9" * 10000 + " }}", "cannot be compiled"),
    ],
)
def test_bad_templates(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: chat_template.*{message}"):
        load(tmp_path)


def test_bad_template_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8"):
        load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: larger"):
        load(tmp_path)


# ---- messages

TEXT_PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: 'hi' must be a list"),
        ({"role": "user"}, "messages: "),
        (None, "messages: None"),
        ([], r"messages: 0 messages, must be in \[1, 4096\]"),
        ([{"role": "user", "content": "x"}] * 4097, "4097 messages"),
        (["hi"], r"messages\[0\]: 'hi' must be an object"),
        ([*USER, {"content": "x"}], r"messages\[1\]\.role: None"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role: ''"),
        ([{"role": "x" * 65, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\.role: 1"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: 5"),
        ([{"role": "user", "content": {"a": 1}}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]: 'x'"),
        ([{"role": "user", "content": [TEXT_PART, {"type": "image"}]}], r"messages\[0\]\.content\[1\]\.type: 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text: None"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\.content: character 0 is half"),
        ([{"role": "user", "content": "x", "tool_calls": "y"}], r"messages\[0\]\.tool_calls: 'y'"),
        ([{"role": "user", "content": "x", "name": object()}], r"messages\[0\]\.name: object is not JSON"),
        ([{"role": "user", "content": "x", "a": {1: 2}}], r"messages\[0\]\.a: key 1"),
        ([{"role": "user", "content": "x", "n": 2**65}], r"messages\[0\]\.n: 36893488147419103232 must fit in 64 bits"),
        ([{"role": "user", "content": "x", "a": [[]] * 100_000}], "more than 100000 values"),
        ([{"role": "user", "content": "x" * (5 * 2**20)}] * 2, r"messages\[1\]\.content: more than 8388608 bytes"),
    ],
)  # fmt: skip
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate("x").render(messages)


def test_deep_messages() -> None:
    nested: Any = "x"
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested deeper than 32"):
        ChatTemplate("x").render([{"role": "user", "content": "x", "a": nested}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "x"}, "tools: 'x' must be a list"),
        ({"tools": ["x"]}, r"tools\[0\]: 'x' must be an object"),
        ({"tools": [{"f": len}]}, r"tools\[0\]\.f: builtin_function_or_method is not JSON"),
        ({"add_generation_prompt": 1}, "add_generation_prompt: 1"),
        ({"documents": []}, "documents"),
        ({"_x": 1}, "_x"),
        ({"x": object()}, "x: object is not JSON"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate("x").render(USER, **options)


def test_messages_are_copied_and_plain() -> None:
    class Loud(str):
        def upper(self) -> str:
            raise AssertionError("a template must not reach foreign code")

    messages = ({"role": Loud("user"), "content": Loud("hi"), "extra": OrderedDict(a=(1, 2)), "none": None},)
    source = "{{ messages[0].content.upper() }}{{ messages[0].extra }}{{ 'none' in messages[0] }}"
    assert ChatTemplate(source).render(messages) == "HI{'a': [1, 2]}False"


# ---- errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only one system message!') }}", "^chat template: Only one system message!$"),
        ("{{ raise_exception('x' * 9999) }}", r"^chat template: x{497}\.\.\.$"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", r"failed on these messages \(TypeError\)"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ no_such_function() }}", "'no_such_function' is undefined"),
        ("{{ '\\ud800' }}", "not Unicode"),
        ("{% for a, b in [1] %}{% endfor %}", "TypeError"),
    ],
)
def test_template_errors(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ChatTemplate(source).render(USER)
    assert "0x" not in str(caught.value)
    assert "/" not in str(caught.value)


def test_a_budget_ends_with_its_rendering() -> None:
    with pytest.raises(ValueError, match="no"):
        ChatTemplate("{{ raise_exception('no') }}").render(USER)
    ChatTemplate("x").render(USER)
    assert current.get(None) is None


def test_renders_from_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate("{% set ns = namespace(s='') %}{% for i in range(200) %}{% set ns.s = ns.s + messages[0].content %}{% endfor %}{{ ns.s }}")  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(template.render, [{"role": "user", "content": str(i)}]) for i in range(40)]
        assert [job.result() for job in jobs] == [str(i) * 200 for i in range(40)]

"""Hostile templates and messages: each ends soon, with a ValueError or a text, and reaches nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nanoserve.text import ChatTemplate, template_budget
from nanoserve.text.template_budget import Budget, TooExpensive

LONG = [{"role": "user", "content": "a" * 8_000_000}]
SHORT = [{"role": "user", "content": "a"}]
SECONDS = 3.0  # of CPU: the limit is one, the rest is one long operation and a slow machine

LOOP = "{% for i in range(100000) %}"
END = "{% endfor %}"
TOO_MUCH = {
    "nested loops": LOOP + LOOP + END + END,
    "silent loops": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% set x = j %}" + END + END,
    "silent recursive loop": "{% set r = [0] * 200000 %}{% for i in range(99) recursive %}"
                             "{% if not loop.depth0 %}{% set y = loop(r) %}{% endif %}{% endfor %}",
    "unrolled search": "{% if 'zzz' in messages[0].content %}{% endif %}" * 2500,
    "unrolled slices": "{% set x = messages[0].content[1:] %}" * 5000,
    "loop filter": (LOOP[:-3] + " if i < 0 %}" + END) * 30,
    "recursive macro": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(30) }}",
    "recursive loop": "{% set x = [0, 0] %}{% for i in x recursive %}{{ loop(x) }}{% endfor %}",
    "call block": "{% macro m() %}{% for i in range(99) %}{{ caller() }}{% endfor %}{% endmacro %}"
                  + "{% call m() %}" * 5 + "x" + "{% endcall %}" * 5,
    "filters in a loop": LOOP + "{{ range(100000) | select('odd') | list | length }}" + END,
    "filter by name": LOOP + "{{ [range(100000)] | map('list') | map('length') | list }}" + END,
    "search in a loop": LOOP + "{% if 'zzz' in messages[0].content %}{% endif %}" + END,
    "compare in a loop": LOOP + "{% if messages == messages[:] %}{% endif %}" + END,
    "slices": "{{ messages[0].content[1:] | length }}" * 1000,
    "slices in a loop": LOOP + "{{ messages[0].content[1:] | length }}" + END,
    "repeat": "{{ 'a' * 10 ** 9 }}",
    "repeat a list": "{{ ([0] * 10 ** 9) | length }}",
    "power": "{{ 2 ** (10 ** 9) }}",
    "products": "{% set ns = namespace(n=3) %}" + LOOP + "{% set ns.n = ns.n * ns.n %}" + END,
    "number from text": "{{ messages[0].content | int(base=16) }}",
    "float from text": "{{ messages[0].content | float }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "round down": "{{ 5 | round(-1000000000) }}",
    "round by name": "{{ [1.5] | map('round', 1000000000, 'ceil') | list }}",
    "doubling +": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = ns.s + ns.s %}" + END,
    "doubling ~": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = ns.s ~ ns.s %}" + END,
    "doubling join": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = [ns.s, ns.s] | join %}" + END,
    "doubling .join": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = ''.join([ns.s, ns.s]) %}" + END,
    "doubling set": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}" + END,
    "doubling %": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}" + END,
    "doubling macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(s='a') %}" + LOOP
                      + "{% set ns.s = d(ns.s) %}" + END,
    "doubling lists": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = [ns.s, ns.s] %}" + END,
    "doubling lists +": "{% set ns = namespace(s=['a']) %}" + LOOP + "{% set ns.s = ns.s + ns.s %}" + END,
    "doubling dicts": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = {'a': ns.s, 'b': ns.s} %}" + END,
    "doubling dict()": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = dict(a=ns.s, b=ns.s) %}" + END,
    "replace": "{{ messages[0].content | replace('a', 'b' * 100000) }}",
    ".replace": "{{ messages[0].content.replace('', 'bbbb') }}",
    "join": "{{ ('b' * 100000).join(messages[0].content | list) }}",
    "join many": "{{ range(100000) | join('b' * 100000) }}",
    "indent": "{{ 'a\n' * 100000 | indent(1000000000) }}",
    "indent text": "{{ ('a\n' * 100000) | indent('b' * 100000) }}",
    "tojson indent": "{{ messages | tojson(indent=1000000000) }}",
    "tojson separators": "{{ messages | tojson(separators=('b' * 1000, ':')) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width by name": "{{ ['%1000000000d'] | map('format', 1) | list }}",
    "static text": "{% set x %}" + LOOP + "b" * 10000 + END + "{% endset %}",
    "static output": LOOP + "b" * 10000 + END,
    "characters": "{{ messages[0].content | list | length }}",
    "split": "{{ messages[0].content.split('a') | length }}",
    "strip set": "{{ messages[0].content.strip(messages[0].content) }}",
    "trim set": "{{ messages[0].content | trim(messages[0].content) }}",
    "search from the right": "{{ messages[0].content.rfind('b' + messages[0].content[:4000000]) }}",
    "charge backwards": LOOP + "{{ [-100000000] | map('\\0static') | list }}" + END,
    "long dates": LOOP + "{{ strftime_now('%Y' * 128) }}" + END,
    "range": "{{ range(100001) | length }}",
    "output": "{{ messages[0].content }}" * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused_soon(name: str) -> None:
    template = ChatTemplate(TOO_MUCH[name])
    begin = time.thread_time()
    with pytest.raises(ValueError, match="chat template: ") as caught:
        template.render(LONG)
    assert time.thread_time() - begin < SECONDS
    assert "undefined" not in str(caught.value)
    assert "unsafe" not in str(caught.value)


ESCAPES = [
    "''.__class__", "''['__class__']", "''.__class__.__mro__[1].__subclasses__()", "messages.__class__", "namespace.__init__",
    "namespace(a=1).__class__", "namespace(__class__=1)", "namespace(_x=1)", "dict.__globals__", "range.__self__",
    "raise_exception.__globals__", "strftime_now.__code__", "loop.__class__", "messages[0].pop('role')",
    "messages.append(1)", "messages[0].update(a=1)", "messages[0].clear()", "'{0.__class__}'.format(1)",
    "'{a.__class__}'.format_map({'a': 1})", "'a'.format", "'a'.center(9)", "'a'.ljust(10 ** 9)", "'a'.zfill(10 ** 9)",
    "'a'.expandtabs(10 ** 9)", "'a'.translate({97: 'b' * 10 ** 6})", "'a'.encode()", "(1).bit_length()", "(1).real",
    "messages.copy()", "messages | map(attribute='__class__') | list", "[[]] | map(attribute='append') | first",
    "messages | map('attr', '__class__') | list", "messages | map('nope') | list", "range(3).start",
    "messages.sort()", "messages.__init__()", "''.join.__self__",
]  # fmt: skip


@pytest.mark.parametrize("expression", ESCAPES)
def test_no_way_out(expression: str) -> None:
    """Internals and methods that are not on the list are undefined: no text, an error if used, and nothing was changed."""
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate("{% for i in [1] %}{{ " + expression + " }}{% endfor %}")
    try:
        text = template.render(messages)
    except ValueError:
        text = ""
    assert text in ("", "[Undefined]")
    assert messages == [{"role": "user", "content": "hi"}]


def test_no_addresses_in_the_text() -> None:
    for expression in ("messages | map('upper')", "range", "messages[0].items", "loop.cycle"):
        with pytest.raises(ValueError, match="chat template: "):
            ChatTemplate("{% for i in [1] %}{{ " + expression + " }}{% endfor %}").render(SHORT)


def test_limits_leave_room_for_long_chats() -> None:
    """4,096 messages of 2,000 characters through a template with macros, namespaces and a lookup per message."""
    template = ChatTemplate("""
        {%- macro turn(m) %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endmacro %}
        {%- set ns = namespace(n=0) %}
        {%- for m in messages %}
            {%- if m.role == 'user' and (loop.first or messages[loop.index0 - 1].role != 'user') %}{% set ns.n = ns.n + 1 %}{% endif %}
            {{- turn(m) }}
        {%- endfor %}{{ ns.n }}""")
    messages = [{"role": "user" if i % 2 else "assistant", "content": "word " * 400} for i in range(4096)]
    text = template.render(messages)
    assert text.endswith("2048")
    assert len(text) > 4096 * 2000


def test_time_is_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 10**12)
    begin = time.thread_time()
    with pytest.raises(ValueError, match="more than 1 s"):
        ChatTemplate(LOOP + LOOP + END + END).render(SHORT)
    assert time.thread_time() - begin < SECONDS


def test_output_limit_counts_bytes() -> None:
    template = ChatTemplate("{{ messages[0].content }}" * 2)
    assert len(template.render([{"role": "user", "content": "é" * 2_000_000}])) == 4_000_000
    with pytest.raises(ValueError, match="makes 12000000 bytes, at most 8388608"):
        template.render([{"role": "user", "content": "你" * 2_000_000}])


@pytest.mark.parametrize(
    ("spend", "message"),
    [
        (lambda b: b.step(1_000_001), "1000000 steps"),
        (lambda b: b.make(8 * 2**20 + 1), "at most 8388608"),
        (lambda b: [b.make(8 * 2**20) for _ in range(33)], "more than 268435456 characters"),
        (lambda b: [b.output(8 * 2**20) for _ in range(9)], "more than 67108864 characters"),
    ],
)
def test_meters(spend: Any, message: str) -> None:
    with pytest.raises(TooExpensive, match=message):
        spend(Budget())


def test_deep_counts_everything_reachable_once_per_path() -> None:
    shared = ["abcd"] * 10
    assert Budget().deep([shared, shared]) > 80
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert Budget().deep(nested) > 0  # no recursion

"""The filters, tests and functions of chat templates, each charged before it runs (template_budget.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2.filters import FILTERS, do_float, do_int, do_round, make_attrgetter
from jinja2.runtime import Context
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from markupsafe import escape as html_escape

from nanoserve.text import template_budget as budget
from nanoserve.text.template_budget import TooExpensive, current
from nanoserve.text.template_rewrite import CONCAT, COUNTED, DEEP, SHALLOW, STATIC

_FILTERS_SHALLOW = (
    "abs count d default first last length list items map reject rejectattr reverse select selectattr"
).split()
_FILTERS_DEEP = "dictsort max min sort unique".split()
_FILTERS_OF_TEXT = "capitalize lower title upper wordcount".split()
_TESTS_DEEP = "== != < <= > >= eq equalto ne lt lessthan le gt greaterthan ge in".split()
MAX_STRFTIME_CHARS = 256
MAX_DIGITS = 300


@jinja2.pass_context
def put_out(context: Context, value: Any) -> str:
    """What {{ }} does with a value. Asking for the context keeps the compiler from evaluating constants."""
    text = budget.text_of(value)
    current.get().output(len(text))
    return text


def filters() -> dict[str, Callable[..., Any]]:
    """Every filter there is."""
    own: dict[str, Callable[..., Any]] = {
        COUNTED: budget.counted,
        SHALLOW: _shallow,
        DEEP: _deep,
        CONCAT: budget.concat,
        STATIC: _static,
        "join": _join,
        "replace": _replace,
        "indent": lambda s, *args, **kwargs: budget.indent(budget.text_of(s), *args, **kwargs),
        "tojson": budget.to_json,
        "string": budget.text_of,
        "safe": budget.text_of,
        "format": lambda pattern, *args, **kwargs: budget.percent_format(
            budget.text_of(pattern), kwargs or args
        ),
        "int": _int,
        "float": _float,
        "round": _round,
        "trim": _trim,
        "escape": _escape,
        "e": _escape,
    }
    own |= {name: _metered(FILTERS[name], _first_shallow) for name in _FILTERS_SHALLOW}
    own |= {name: _metered(FILTERS[name], _all_deep) for name in _FILTERS_DEEP}
    own |= {name: _metered(FILTERS[name], _first_as_text) for name in _FILTERS_OF_TEXT}
    return own


def tests() -> dict[str, Callable[..., Any]]:
    """jinja's tests; those that compare are charged for what they compare."""
    own: dict[str, Any] = dict(TESTS)
    return own | {name: _metered(own[name], _all_deep) for name in _TESTS_DEEP}


def functions() -> dict[str, Callable[..., Any]]:
    """Every global name there is."""
    return {
        "range": _range,
        "dict": make_dict,
        "namespace": TemplateNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    for value in (*args, *kwargs.values()):
        current.get().deep(value)
    return dict(*args, **kwargs)


class TemplateNamespace(Namespace):
    """jinja's namespace without underscored names, and without a repr that could grow."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace's attributes must not begin with an underscore")


def _metered(function: Any, charge: Callable[[list[Any]], None]) -> Callable[..., Any]:
    """The function, its arguments charged before it runs. wraps() keeps jinja's mark that it wants the context."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        values = list(args[first:])
        if values and isinstance(values[0], Iterator):
            values[0] = budget.counted(values[0])
        charge(values)
        return function(*args[:first], *values, **kwargs)

    return metered


def _first_shallow(values: list[Any]) -> None:
    current.get().shallow(values[0] if values else None)


def _all_deep(values: list[Any]) -> None:
    if values and isinstance(values[0], Iterator):
        values[0] = list(values[0])
    for value in values:
        current.get().deep(value)


def _first_as_text(values: list[Any]) -> None:
    if values:
        values[0] = budget.text_of(values[0])
        current.get().make(len(values[0]))


def _shallow(value: Any) -> Any:
    current.get().shallow(value)
    return value


def _deep(value: Any) -> Any:
    current.get().deep(value)
    return value


def _static(chars: Any) -> None:
    current.get().output(max(int(chars), 0))


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return budget.join(budget.text_of(d), items)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    old, new = budget.text_of(old), budget.text_of(new)
    return budget.replace(budget.text_of(s), old, new, -1 if count is None else count)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    _check_digits(value)
    return do_int(value, default, base)


def _float(value: Any, default: float = 0.0) -> float:
    _check_digits(value)
    return do_float(value, default)


def _check_digits(value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise TooExpensive(f"a number of {len(value)} characters, at most {MAX_DIGITS} are allowed")


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if not isinstance(precision, int) or abs(precision) > MAX_DIGITS:  # jinja computes 10 to the power of it
        raise TooExpensive(f"round: the precision must be in [-{MAX_DIGITS}, {MAX_DIGITS}]")
    return do_round(value, precision, method)


def _trim(value: Any, chars: str | None = None) -> str:
    budget.check_pattern(chars)
    text = budget.text_of(value)
    current.get().make(len(text))
    return text.strip(chars)


def _escape(value: Any) -> str:
    text = budget.text_of(value)
    current.get().make(6 * len(text))  # a quote becomes &#34;
    return str(html_escape(text))


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > budget.MAX_RANGE:
        raise TooExpensive(f"range: {len(numbers)} numbers, at most {budget.MAX_RANGE} are allowed")
    return numbers


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(budget.text_of(message))


def _strftime_now(format: Any) -> str:
    if not isinstance(format, str) or len(format) > MAX_STRFTIME_CHARS:
        raise TooExpensive(
            f"strftime_now: the format must be a string of at most {MAX_STRFTIME_CHARS} characters"
        )
    return datetime.now().strftime(format)

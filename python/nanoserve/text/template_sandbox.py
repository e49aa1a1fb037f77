"""The jinja environment chat templates run in: transformers' dialect, with every cost metered.

Dialect: trim_blocks, lstrip_blocks, break and continue, raise_exception, strftime_now, tojson without HTML escaping, a
{% generation %} tag that changes nothing. As in transformers a template sees plain data only.

On top of jinja's immutable sandbox:
  - only listed statements, filters and functions exist; a template that names another is refused when it is loaded;
  - of Python's methods only those listed here, and none that formats;
  - the syntax tree is rewritten before it is compiled, so that loops, comparisons, slices, containers and text pass through
    the meters of template_budget.py. Nothing is folded at compile time: an expensive constant must not run unmetered.

Differences from transformers that show: `safe` and `escape` give plain strings, and `.format()` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2.ext import LoopControlExtension
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nanoserve.text import template_budget as budget
from nanoserve.text.template_budget import current
from nanoserve.text.template_functions import filters, functions, put_out, tests
from nanoserve.text.template_rewrite import GenerationTag, TemplateRefused, check, with_meters

MAX_TAGS = 10_000  # compiling a template takes jinja 0.1 ms per tag; published ones have a few hundred
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace isupper "
        "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
        "splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset("get items keys values".split()),
    list: frozenset("count index".split()),
    tuple: frozenset("count index".split()),
    LoopContext: frozenset(
        "index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle".split()
    ),
}


def compile_template(source: str) -> jinja2.Template:
    """A template, to be rendered with a `current` budget.

    Raises:
        TemplateRefused: a statement, filter, test or name that is not supported.
        jinja2.TemplateSyntaxError: as jinja says.
    """
    if source.count("{%") + source.count("{{") > MAX_TAGS:
        raise TemplateRefused(f"more than {MAX_TAGS} tags")
    environment = TemplateEnvironment()
    tree = environment.parse(source)
    check(tree, environment)
    return environment.from_string(with_meters(tree, environment))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, LoopControlExtension],
            optimized=False,
            finalize=put_out,
            cache_size=0,
        )
        self.binop_table.update(
            {"+": budget.add, "*": budget.multiply, "**": budget.power, "%": budget.modulo}
        )
        self.filters: dict[str, Any] = filters()
        self.tests: dict[str, Any] = tests()
        self.globals: dict[str, Any] = dict(functions())

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Called with what getattr found; a key of a dict that is no attribute does not come here."""
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return False

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """jinja would let str.format through; here it is a method like any other, and not on the list."""
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = current.get()
        meter.step()
        owner = None if isinstance(__obj, Undefined) else getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            for name in ("_loop_vars", "_block_vars"):  # jinja's own, for functions that want the context
                kwargs.pop(name, None)
            return _call_text_method(owner, __obj.__name__, args, kwargs)
        if isinstance(owner, list | tuple):
            meter.deep(owner)  # count() and index() compare
        return super().call(__context, __obj, *args, **kwargs)


# Searching from the right, and cutting off characters of a set, take time text x argument in CPython.
_SLOW_METHODS = frozenset("strip lstrip rstrip rfind rindex rsplit rpartition".split())


def _call_text_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meter = current.get()
    meter.shallow(text)
    for value in args:
        meter.shallow(value)
        if name in _SLOW_METHODS:
            budget.check_pattern(value)
    if name == "join":
        return budget.join(text, *map(_texts, args), **kwargs)
    if name == "replace":
        return budget.replace(text, *args, **kwargs)
    meter.make(0 if name in ("startswith", "endswith") else len(text))
    result = getattr(text, name)(*args, **kwargs)
    if isinstance(result, list):
        meter.shallow(result)
    return result


def _texts(items: Iterable[Any]) -> Iterator[str]:
    """str.join takes strings only, and so must a template's."""
    for item in items:
        if not isinstance(item, str):
            raise TypeError("join: every item must be a string")
        yield item

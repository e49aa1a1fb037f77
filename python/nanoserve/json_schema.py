"""Which JSON schemas structured outputs take: known keywords, bounded size, depth and cost.

A keyword that the grammar compiler would pass over is refused here by name, so nothing in a schema is ignored
silently: what is not in the tables below has no meaning for the output. The compiler itself refuses more
(combinations it cannot express).

The limits are on what makes compiling expensive: its time and memory grow with the size of the schema, but also with
the states of a `multipleOf` (a remainder each) and with every regular expression that is intersected with others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from nanoserve.checks import few, shown

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64  # of the JSON text, not of what refers to itself
MAX_REGEX_CHARS = 4096
MAX_PATTERNS = 64  # in one schema
MAX_OPTIONAL = 400  # properties of one object: any of them may come next
MAX_MULTIPLES = 10_000  # sum over a schema of the significant digits of every multipleOf, read as an integer

Path = tuple[str | int, ...]

# Keyword -> where the schemas in its value are: it is one, it is a list of them or an object of them.
_ONE = {"items", "additionalProperties", "additionalItems"}
_LIST = {"prefixItems", "items", "anyOf", "oneOf", "allOf"}
_OBJECT = {"properties", "patternProperties", "$defs", "definitions"}
_PLAIN = set(
    "type enum const minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minItems maxItems required minProperties maxProperties $ref".split()
)
# What says nothing about the value.
_NOTES = set(
    "title description default example examples deprecated readOnly writeOnly discriminator $comment $anchor".split()
)
_ROOT = {"$schema", "$id"}
_KNOWN = _ONE | _LIST | _OBJECT | _PLAIN | _NOTES


def check_schema(field: str, schema: Any) -> None:
    """Refuses what is unknown, too deep or too costly; the values of known keywords are the compiler's to check.

    Raises:
        ValueError: naming the place in the schema, the value and the limit.
    """
    check_depth(field, schema)
    if not isinstance(schema, Mapping):
        raise ValueError(f"{field}: {shown(schema)} must be a JSON schema, an object")
    patterns, multiples = 0, 0
    for path, node in _schemas(schema):
        if not isinstance(node, Mapping):
            continue  # true or false, or something that the compiler refuses
        place = _place(field, path)
        unknown = [str(name) for name in node if name not in (_KNOWN if path else _KNOWN | _ROOT)]
        if unknown:
            raise ValueError(f"{place}: keyword {few([shown(name) for name in unknown])} is not supported")
        ref = node.get("$ref", "#")
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise ValueError(f"{place}.$ref: {shown(ref)} must be inside the schema, beginning with #")
        names, required = node.get("properties"), node.get("required")
        if isinstance(names, Mapping) and isinstance(required, list | tuple | None):
            optional = len(names) - sum(name in names for name in required or () if isinstance(name, str))
            if optional > MAX_OPTIONAL:
                raise ValueError(
                    f"{place}.properties: {optional} that are not required, at most {MAX_OPTIONAL} are allowed"
                )
        expressions = (
            list(node["patternProperties"]) if isinstance(node.get("patternProperties"), Mapping) else []
        )
        expressions += [node["pattern"]] if "pattern" in node else []
        for expression in expressions:
            check_regex(f"{place}.pattern", expression)
        patterns += len(expressions)
        multiples += _states(node.get("multipleOf", 1))
        if patterns > MAX_PATTERNS:
            raise ValueError(
                f"{place}.pattern: {patterns} of them in the schema, at most {MAX_PATTERNS} are allowed"
            )
        if multiples > MAX_MULTIPLES:
            raise ValueError(
                f"{place}.multipleOf: {shown(node['multipleOf'])} makes it {multiples} remainders in the schema, "
                f"at most {MAX_MULTIPLES} are allowed"
            )


def check_regex(field: str, regex: object) -> None:
    """Text of at most MAX_REGEX_CHARS characters."""
    if not isinstance(regex, str):
        raise ValueError(f"{field}: {shown(regex)} must be a regular expression, a string")
    if len(regex) > MAX_REGEX_CHARS:
        raise ValueError(
            f"{field}: {shown(regex)} has {len(regex)} characters, at most {MAX_REGEX_CHARS} are allowed"
        )


def check_depth(field: str, value: Any) -> None:
    """Lists and objects in each other at most MAX_SCHEMA_DEPTH deep, and not endlessly many; without recursion."""
    waiting, seen = [(1, value)], 0
    while waiting:
        depth, one = waiting.pop()
        seen += 1
        if seen > MAX_SCHEMA_BYTES:  # objects of Python may share their parts: as text it is a tree
            raise ValueError(f"{field}: more than {MAX_SCHEMA_BYTES} bytes, no more are allowed")
        inner = one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else ()
        if inner and depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"{field}: nested deeper than {MAX_SCHEMA_DEPTH} levels")
        waiting += [(depth + 1, each) for each in inner]


def _schemas(root: Any) -> Iterator[tuple[Path, Any]]:
    """Every schema in a schema, with its place."""
    waiting: list[tuple[Path, Any]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        if not isinstance(node, Mapping):
            continue
        for name, value in node.items():
            if name in _LIST and isinstance(value, list):
                waiting += [((*path, name, i), one) for i, one in enumerate(value)]
            elif name in _OBJECT and isinstance(value, Mapping):
                waiting += [((*path, name, str(key)), one) for key, one in value.items()]
            elif name in _ONE:
                waiting.append(((*path, name), value))


def _states(multiple: Any) -> int:
    """About how many remainders a multipleOf tells apart."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return 1  # the compiler's to refuse
    value = Decimal(repr(multiple))
    if not value.is_finite():
        return 1
    digits, exponent = value.normalize().as_tuple()[1:]
    significand = int("".join(map(str, digits)) or "0")
    return min(significand * 10 ** min(max(int(exponent), 0), 18), MAX_MULTIPLES + 1) or 1


def _place(field: str, path: Path) -> str:
    place = field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return place if len(place) <= 120 else place[:60] + "..." + place[-57:]

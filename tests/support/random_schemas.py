"""Random JSON schemas: objects, arrays, numbers with bounds, strings, enums, anyOf; every keyword says something."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("a", "name", "größe", "x y", 'quo"te', "back\\slash", "new\nline", "名前", "id", "z9")
_PATTERNS = ("^[a-c]{1,4}$", "^(ab|cd)*$", "^\\d{2}-\\d{2}$", "^[^\\x00-\\x1f]{1,3}$", "^é?[xy]$")


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Every value it describes is short, so that a random model comes to its end."""
    kinds = ["integer", "number", "string", "enum", "const", "boolean", "null"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "ref"][: 5 if depth == 0 else 4]
    return _MAKERS[rng.choice(kinds)](rng, depth)


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice([-1000, -7, 0, 3])
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 5, 2000])}
    if rng.random() < 0.3:
        schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 100}
    if rng.random() < 0.2:
        schema = {"type": "integer", "minimum": 0, "maximum": 700, "multipleOf": rng.choice([2, 7, 25])}
    return schema


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice([-2.5, 0, 0.125])
    return {"type": "number", "minimum": low, "maximum": low + rng.choice([1, 10.75])}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample([1, -3, 2.5, None, True, *_WORDS, [1, "a"], {"k": None}], rng.randint(1, 5))}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["", "é", 0, None, False, [], {}, ["x", {"y": 2}]])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "array",
        "items": random_schema(rng, depth + 1),
        "maxItems": rng.randint(1, 3),
    }
    if rng.random() < 0.4:
        schema["minItems"] = rng.randint(0, schema["maxItems"])
    if rng.random() < 0.3:
        schema = {
            "type": "array",
            "prefixItems": [random_schema(rng, depth + 1) for _ in range(2)],
            "items": False,
            "minItems": 1,
        }
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def _ref(rng: random.Random, depth: int) -> dict[str, Any]:
    """At the root only: a list that may go on, each time less likely to."""
    node = {
        "type": "object",
        "properties": {
            "v": random_schema(rng, 3),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["v"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


_MAKERS = {
    "integer": _integer, "number": _number, "string": _string, "enum": _enum, "const": _const, "object": _object,
    "array": _array, "anyOf": _any_of, "ref": _ref, "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
}  # fmt: skip

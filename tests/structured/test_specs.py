"""What may be asked for: one form at a time, known keywords, every limit with its number."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from nanoserve.structured import StructuredOutputs
from nanoserve.text.byte_tokenizer import ByteTokenizer
from nanoserve.text.grammar import GrammarCompiler

COMPILER = GrammarCompiler(ByteTokenizer(), 256)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def shared(levels: int) -> list[Any]:
    """2**levels lists, of which only `levels` exist."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


OPTIONAL: dict[str, Any] = {str(i): {} for i in range(402)}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing is given"),
    ({"json": {}, "regex": "a"}, "json, regex is given, must be exactly one"),
    ({"json_object": 1}, "json_object: 1 must be True or False"),
    ({"regex": 3}, "regex: 3 must be a regular expression"),
    ({"regex": "a" * 4097}, "4097 characters, at most 4096"),
    ({"regex": "\ud800"}, "half of a surrogate pair"),
    ({"choice": []}, "choice: .* not empty"),
    ({"choice": "abc"}, "choice: 'abc' must be a sequence"),
    ({"choice": ["a", ""]}, r"choice\[1\]: '' must be a text"),
    ({"choice": ["a"] * 1025}, "1025 texts, at most 1024"),
    ({"choice": ["é" * 1000] * 33}, "66000 bytes, at most 65536"),
    ({"json": "{"}, "is not a JSON schema"),
    ({"json": '{"type": "integer", "type": "string"}'}, "twice"),
    ({"json": '{"minimum": NaN}'}, "NaN is no JSON"),
    ({"json": {"minimum": float("inf")}}, "must be JSON"),
    ({"json": {"default": {1, 2}}}, "must be JSON"),
    ({"json": '{"const": 1' + "0" * 5000 + "}"}, "is not a JSON schema"),
    ({"json": True}, "must be a JSON schema, an object"),
    ({"json": "[1]"}, "must be a JSON schema, an object"),
    ({"json": {"description": "x" * 65536}}, "at most 65536 are allowed"),
    ({"json": '{"description": "' + "x" * 300_000 + '"}'}, "at most 65536 are allowed"),
    ({"json": {"const": shared(60)}}, "65536 bytes"),
    ({"json": nested(65)}, "deeper than 64 levels"),
    ({"json": '{"items":' * 20_000 + "1" + "}" * 20_000}, "deeper than 64 levels"),
    ({"json": {"not": {}}}, "json: keyword 'not' is not supported"),
    ({"json": {"properties": {"a": {"anyOf": [{}, {"if": {}}]}}}}, r"json.properties.a.anyOf\[1\]: keyword 'if'"),
    ({"json": {"nullable": True, "type": "string"}}, "keyword 'nullable'"),
    ({"json": {"x-guidance": {"lenient": True}}}, "keyword 'x-guidance'"),
    ({"json": {"items": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "keyword '.schema'"),
    ({"json": {"$ref": "https://example.com/schema.json"}}, "ref: 'https://example.com/schema.json' must be inside"),
    ({"json": {"items": {"$ref": "file:///etc/passwd"}}}, "items.*ref: .* must be inside"),
    ({"json": {"$ref": 3}}, "ref: 3 must be inside"),
    ({"json": {"pattern": "a" * 4097}}, "4097 characters, at most 4096"),
    ({"json": {"patternProperties": {"a" * 4097: {}}}}, "4097 characters, at most 4096"),
    ({"json": {"prefixItems": [{"pattern": "a"}] * 65}}, "65 of them in the schema, at most 64"),
    ({"json": {"properties": OPTIONAL, "required": ["0", 3]}}, "401 that are not required, at most 400"),
    ({"json": {"multipleOf": 10_001}}, "10001 remainders in the schema, at most 10000"),
    ({"json": {"multipleOf": 0.00123457}}, "remainders in the schema, at most 10000"),
    ({"json": {"prefixItems": [{"multipleOf": 101}] * 100}}, "at most 10000"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_a_bad_spec_is_refused_with_field_value_and_limit(fields: dict[str, Any], why: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=why) as failure:
        StructuredOutputs(**fields)
    assert str(failure.value).startswith("structured_outputs")
    assert len(str(failure.value)) < 400
    assert time.process_time() - began < 2


def test_what_is_on_the_limit_is_taken() -> None:
    StructuredOutputs(regex="a" * 4096)
    StructuredOutputs(choice=["a"] * 1024)
    StructuredOutputs(choice=["é" * 1024] * 32)
    StructuredOutputs(json=nested(62))
    StructuredOutputs(json={"multipleOf": 10_000})
    StructuredOutputs(json={"properties": {f"p{i}": {} for i in range(401)}, "required": ["p0"]})
    StructuredOutputs(json={"prefixItems": [{"pattern": "a"}] * 64})
    StructuredOutputs(json={"description": "x" * (65536 - len('{"description":""}'))})


def test_a_schema_is_kept_as_text_in_its_own_order() -> None:
    """So the parameters stay hashable, equal and out of the caller's reach."""
    schema: dict[str, Any] = {"type": "object", "properties": {"z": {}, "a": {}}}
    spec = StructuredOutputs(json=schema)
    same = StructuredOutputs(json=json.dumps(schema, indent=4))
    schema["properties"]["b"] = {}
    assert spec == same
    assert hash(spec) == hash(same)
    assert spec.json == '{"type":"object","properties":{"z":{},"a":{}}}'
    assert spec.form == "json"


# Passed by the checks above, refused by the compiler: in a bounded time, with a sentence, and never with a crash.
def chain(link: str, count: int) -> str:
    links = ",".join(f'"{i}":' + link.replace("#", f'"#/$defs/{i + 1}"') for i in range(count))
    return f'{{"$defs":{{{links},"{count}":{{"type":"integer"}}}},"$ref":"#/$defs/0"}}'


COSTLY: dict[str, dict[str, Any]] = {
    "refs-in-items": {"json": chain('{"items":{"$ref":#}}', 1500)},
    "refs-in-allOf": {"json": chain('{"allOf":[{"$ref":#}]}', 1450)},
    "refs-nested": {"json": chain('{"items":' * 50 + '{"$ref":#}' + "}" * 50, 110)},
    "refs-doubled": {"json": chain('{"allOf":[{"$ref":#},{"$ref":#}]}', 800)},
    "anyOf-squared": {"json": {"allOf": [{"anyOf": [{"type": "string", "maxLength": i} for i in range(8)]}] * 12}},
    "objects-squared": {"json": {"allOf": [
        {"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(8)]} for i in range(10)
    ]}},
    "patterns-intersected": {"json": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(5, 25)]}},
    "pattern-and-length": {"json": {"type": "string", "pattern": "a.{900}b", "minLength": 1000, "maxLength": 2000}},
    "multiples-intersected": {"json": {"type": "integer", "allOf": [{"multipleOf": m} for m in (89, 97, 83, 79, 73)]}},
    "optional-many": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(400)}}},
    "items-many": {"json": {"type": "array", "minItems": 10**9, "items": {"minItems": 10**9}}},
    "string-long": {"json": {"type": "string", "minLength": 10**9}},
    "numbers-wide": {"json": {"type": "number", "minimum": -1.5e300, "maximum": 2.5e300}},
    "enum-many": {"json": {"enum": [f"value {i}" for i in range(3500)]}},
    "repeats": {"regex": "((a{1000}){1000}){1000}"},
    "repeats-late": {"regex": "x.*(a{1000}){1000}"},
    "states": {"regex": "(a|b)*a(a|b){300}"},
    "optional-a": {"regex": "a?" * 1500 + "b"},
    "nested-groups": {"regex": "(" * 2000 + "a" + ")" * 2000},
    "nested-repeats": {"regex": "a" + "{1,2}" * 240},
    "unicode": {"regex": r"(\p{L}|\p{N}){200}\w{500}"},
    "choices": {"choice": [f"{i:060d}" for i in range(1024)]},
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_spec_ends_in_bounded_time(name: str) -> None:
    """Compiled or refused, and every step of what is compiled is short, or the matcher gives up with a sentence."""
    spec = StructuredOutputs(**COSTLY[name])
    began = time.process_time()
    failure, steps = "", []
    try:
        matcher = COMPILER.compile(spec).matcher()
        took = time.process_time() - began
        while len(steps) < 200 and not matcher.must_end():
            began = time.process_time()
            mask = matcher.allowed()
            (word,) = mask.nonzero()[0][:1]
            matcher.accept(int(word) * 32 + int(mask[word]).bit_length() - 1)
            steps.append(time.process_time() - began)
    except ValueError as error:
        took = time.process_time() - began if not steps else took
        failure = str(error)
    assert took < 10
    assert max(steps, default=0) < 1
    assert steps or failure
    assert failure == "" or failure.startswith(("structured_outputs.", "structured_outputs:"))
    assert len(failure) < 400


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"json": {"type": "string", "format": "postcode"}}, "json: Unknown format: postcode"),
        ({"json": {"type": "text"}}, "json: Invalid type: text"),
        ({"json": {"$ref": "#/$defs/gone"}}, "json: .*gone"),
        ({"json": {"minimum": 3, "maximum": 2, "type": "integer"}}, "json: Unsatisfiable schema"),
        ({"json": {"enum": []}}, "json: Unsatisfiable schema"),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "json: oneOf"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "json: regex parse error: look-around"),
        ({"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "json: "),
        ({"regex": "a(b"}, "regex: .*unclosed group"),
        ({"regex": "a)(b"}, "regex: "),
        ({"regex": r"(a)\1"}, "regex: "),
        ({"regex": r"a\bb"}, "regex: "),
        ({"regex": "[a&&b]"}, "regex: no token of the vocabulary leads to a text"),
        ({"regex": ""}, "regex: only the empty text"),
        ({"regex": "x{0}"}, "regex: only the empty text"),
    ],
)  # fmt: skip
def test_what_the_compiler_refuses_names_the_field(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=rf"structured_outputs\.{why}"):
        COMPILER.compile(StructuredOutputs(**fields))


def test_compiled_grammars_are_kept_but_not_all_of_them() -> None:
    compiler = GrammarCompiler(ByteTokenizer(), 256)
    first = compiler.compile(StructuredOutputs(regex="a0"))
    for i in range(1, 64):
        compiler.compile(StructuredOutputs(regex=f"a{i}"))
    assert compiler.compile(StructuredOutputs(regex="a0")) is first
    compiler.compile(StructuredOutputs(regex="a64"))
    assert compiler.compile(StructuredOutputs(regex="a0")) is first, "it was the latest but one"
    assert len(compiler._kept) == 64
    for i in range(24):
        compiler.compile(StructuredOutputs(json={"title": f"{i:02d}" * 25_000, "type": "null"}))
    assert sum(spec.num_bytes for spec in compiler._kept) <= 2**20
    assert compiler.compile(StructuredOutputs(regex="a0")) is not first


def test_other_threads_keep_their_stack_size() -> None:
    import threading

    before = threading.stack_size()
    COMPILER.compile(StructuredOutputs(regex="stack"))
    assert threading.stack_size() == before

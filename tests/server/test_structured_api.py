"""JSON by schema and forced tool calls, over HTTP, from a model that knows of neither: what comes out is valid all the same."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from tests.server.conftest import Running
from tests.support.random_schemas import random_schema

from nanoserve.outputs import TextDelta
from nanoserve.server.chat import Choice
from nanoserve.server.tool_calls import HERMES

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Go"}], "max_tokens": 300}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["a", "é"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "point", "parameters": POINT}},
    {"type": "function", "function": {"name": "stop"}},
]


def chat(served: Running, **fields: Any) -> Any:
    answer = served.post("/v1/chat/completions", {**ASK, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_has_the_form_that_was_asked_for(served: Running, seed: int) -> None:
    choice = chat(served, response_format=json_schema(POINT), seed=seed, temperature=1.5)
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), POINT)


def test_random_schemas_at_once(served: Running) -> None:
    """Each with its own matcher, all in one batch; what did not fit into max_tokens is told."""
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(40)]

    def ask(at: int) -> tuple[Any, Any]:
        return schemas[at], chat(served, response_format=json_schema(schemas[at]), seed=at, temperature=1.0)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(len(schemas))))
    stopped = [(schema, choice) for schema, choice in answers if choice["finish_reason"] == "stop"]
    assert len(stopped) >= len(answers) // 2
    for schema, choice in stopped:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_any_object(served: Running) -> None:
    prompt = served.complete(
        prompt="x",
        response_format={"type": "json_object"},
        max_tokens=400,
        temperature=0.7,
        seed=1,
        logit_bias={"125": 20},
    )
    assert isinstance(json.loads(prompt["choices"][0]["text"]), dict)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "https://example.com/schema"}, "ref"),
        ({"type": "object", "unknownKeyword": 1}, "unknownKeyword"),
        ({"type": "string", "pattern": "("}, "regex"),
    ],
)
def test_a_schema_that_cannot_be_is_refused_and_harms_nobody(
    served: Running, schema: Any, words: str
) -> None:
    answer = served.post("/v1/chat/completions", {**ASK, "response_format": json_schema(schema)})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["param"].startswith("response_format.json_schema.schema")
    assert chat(served, max_tokens=2)


def test_one_call_at_most_where_that_is_asked_for(served: Running) -> None:
    """A call is short where white space is unlikely, and another one follows where ending is unlikelier still."""
    counts: dict[bool, set[int]] = {True: set(), False: set()}
    for seed in range(6):
        for parallel in counts:
            asked = {
                **ASK, "tools": TOOLS[1:], "tool_choice": "required", "parallel_tool_calls": parallel, "seed": seed, "temperature": 1.0,
                "logit_bias": {"32": -100, "10": -90, "9": -100, "13": -100, "0": -100},
            }  # fmt: skip
            (choice,) = served.post("/v1/chat/completions", asked).json()["choices"]
            counts[parallel].add(len(choice["message"].get("tool_calls") or []))
            assert parallel or choice["finish_reason"] == "tool_calls"  # and nothing after it is computed
    assert counts[False] == {1}
    assert max(counts[True]) > 1


def test_calls_beyond_the_first_are_left_out() -> None:
    text = "".join(f'<tool_call>{{"name": "f", "arguments": {{"x": {x}}}}}</tool_call>\n' for x in range(3))
    for most, expected in ((None, 3), (1, 1)):
        choice = Choice(0, HERMES, most)
        pieces = [choice.push(TextDelta(0, piece)) for piece in text]
        pieces.append(choice.push(TextDelta(0, "", finish_reason="stop")))
        told = [call for piece in pieces for call in piece.get("tool_calls", ())]
        assert [json.loads(call["function"]["arguments"]) for call in told] == [
            {"x": x} for x in range(expected)
        ]
        assert len(choice.message["tool_calls"]) == expected
        assert choice.reason("stop") == "tool_calls"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "point"}}], ids=["required", "named"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_a_call(served: Running, choice: Any, stream: bool) -> None:
    client = served.openai()
    for seed in range(4):
        asked: dict[str, Any] = {
            **ASK,
            "tools": TOOLS,
            "tool_choice": choice,
            "seed": seed,
            "temperature": 1.0,
            "logit_bias": {"10": -100},
        }
        whole = client.chat.completions.create(**asked).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or []]
        if stream:
            made: list[Any] = []
            reason = None
            for chunk in client.chat.completions.create(**asked, stream=True):
                made += [call for one in chunk.choices for call in one.delta.tool_calls or []]
                reason = next((one.finish_reason for one in chunk.choices if one.finish_reason), reason)
            assert [(call.function.name, call.function.arguments) for call in made] == calls
            assert [call.index for call in made] == list(range(len(made)))
            assert reason == whole.finish_reason
        if whole.finish_reason == "length":
            continue
        assert whole.finish_reason == "tool_calls"
        assert calls
        assert len(calls) == 1 or choice == "required"
        for name, arguments in calls:
            assert name in ("point", "stop")
            assert name == "point" or choice == "required"
            jsonschema.validate(json.loads(arguments), POINT if name == "point" else {"type": "object"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
    ],
    ids=str,
)
def test_combinations_that_cannot_be(served: Running, fields: dict[str, Any], param: str) -> None:
    answer = served.post("/v1/chat/completions", {**ASK, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)

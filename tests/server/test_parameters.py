"""Parameters: honoured, refused by name, or named as ignored; never dropped in silence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from nanoserve import SamplingParams
from nanoserve.server.errors import ApiError
from nanoserve.server.parameters import (
    REFUSED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    capabilities,
    parse_parameters,
)
from nanoserve.server.settings import ServerSettings

SETTINGS = ServerSettings(max_n=4)
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hi"}


def refused(body: dict[str, Any], model: Any = CompletionRequest) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse_parameters(model, body, SETTINGS)
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", "1", "number"),
        ("temperature", True, "number"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 5, "at most 4"),
        ("max_tokens", -1, "greater than or equal to 0"),
        ("max_tokens", 1.5, "integer"),
        ("max_tokens", 2**31, "less than or equal to"),
        ("stop", [""], "at least 1 character"),
        ("stop", ["x"] * 17, "at most 16"),
        ("stop", "x" * 257, "at most 256"),
        ("stop", 3, "string"),
        ("logit_bias", {"1": 101}, "less than or equal to 100"),
        ("logit_bias", {str(i): 0 for i in range(1025)}, "at most 1024"),
        ("logprobs", 21, "less than or equal to 20"),
        ("stop_token_ids", [-1], "greater than or equal to 0"),
        ("prompt", [], "at least 1"),
        ("prompt", {"text": 1}, "string"),
        ("prompt", [1, "a"], ""),
        ("prompt", [2**40], "less than or equal"),
        ("stream_options", {"include_usage": 1}, "boolean"),
        ("stream_options", {"other": 1}, "not permitted"),
        ("response_format", {"type": "xml"}, "json_schema"),
        ("user", "x" * 257, "at most 256"),
        ("timeout", 0, "greater than 0"),
    ],
)
def test_a_bad_value_is_named(field: str, value: Any, words: str) -> None:
    error = refused({**COMPLETION, field: value})
    assert error.param is not None
    assert error.param.startswith(field)
    assert words in error.message
    assert len(error.message) < 400


def test_what_is_missing_is_named() -> None:
    assert refused({"prompt": "Hi"}).param == "model"
    assert refused({"model": "m"}, ChatRequest).code == "missing_required_parameter"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_known_and_not_done_is_refused_and_its_neutral_values_pass(name: str) -> None:
    neutral, why = REFUSED[name]
    error = refused({**CHAT, name: "something else"}, ChatRequest)
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert why in error.message
    for value in neutral:
        _, ignored = parse_parameters(ChatRequest, {**CHAT, name: value}, SETTINGS)
        assert ignored == []


def test_one_is_not_true() -> None:
    assert refused({**COMPLETION, "best_of": True}).param == "best_of"
    assert refused({**COMPLETION, "store": 0}).param == "store"


def test_unknown_is_accepted_and_named() -> None:
    _, ignored = parse_parameters(ChatRequest, {**CHAT, "zeta": 1, "alpha": None}, SETTINGS)
    assert ignored == ["alpha", "zeta"]
    _, ignored = parse_parameters(DetokenizeRequest, {"tokens": [1], "x": 1}, SETTINGS)
    assert ignored == ["x"]


def test_null_is_not_given() -> None:
    names = [name for name in CompletionRequest.model_fields if name not in ("model", "prompt")]
    made, ignored = parse_parameters(CompletionRequest, {**COMPLETION, **dict.fromkeys(names)}, SETTINGS)
    assert ignored == []
    assert all(getattr(made, name) is None for name in names)


def test_every_sampling_parameter_can_be_asked_for() -> None:
    known = set(CompletionRequest.model_fields) | {"structured_outputs"}  # which response_format says
    assert {field.name for field in fields(SamplingParams)} <= known


def test_capabilities_are_the_table() -> None:
    told = capabilities(SETTINGS)["/v1/chat/completions"]
    assert set(told["honoured"]) == set(ChatRequest.model_fields)
    assert told["honoured"]["n"]["maximum"] == 4
    assert set(told["refused"]) == set(REFUSED)
    assert not set(told["refused"]) & set(told["honoured"])

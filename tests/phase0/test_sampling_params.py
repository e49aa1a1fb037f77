"""Phase 0: the limits of sampling parameters. A field works, or is refused by name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from nanoserve.sampling import SamplingParams

DEFAULTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "max_tokens": 128,
    "min_tokens": 0,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "seed": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "logprobs": None,
    "n": 1,
    "include_stop_str_in_output": False,
    "bad_words": (),
    "prompt_logprobs": None,
    "skip_special_tokens": True,
    "structured_outputs": None,
}
NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, 100.1, NAN, INF, -INF, "1", None, True],
    "top_k": [-2, 2**31, 1.0, True, None, NAN],
    "top_p": [0, 0.0, -0.5, 1.0001, NAN, INF, True, "0.9"],
    "min_p": [-0.1, 1.1, NAN, False],
    "max_tokens": [0, -5, 2**31, 1.5, True, None],
    "min_tokens": [-1, 129, 0.0, True],
    "stop": [5, [""], "", [None], ["x"] * 17, None],
    "stop_token_ids": [[-1], [2**31], [1.0], [True], 5, "5", None, list(range(257))],
    "ignore_eos": [0, 1, None, "yes"],
    "seed": [-1, 2**64, 1.0, True, "0"],
    "presence_penalty": [-2.5, 2.5, NAN, True, None],
    "frequency_penalty": [-2.5, 2.5, NAN],
    "repetition_penalty": [0, -1, 0.009, 100.1, NAN, INF],
    "logit_bias": [[1, 2], 3, dict.fromkeys(range(1025), 0.0)],
    "logprobs": [-1, 21, 1.0, True],
    "n": [0, -1, 129, 1.0, True],
    "include_stop_str_in_output": [0, None, "no"],
    "bad_words": [5, "one", [""], [3], ["x"] * 257, None],
    "prompt_logprobs": [-1, 21, 1.0, True],
    "skip_special_tokens": [1, None],
    "structured_outputs": [{"json": {}}, "json", 1, True],
}


def test_the_fields_and_defaults_are_the_published_ones() -> None:
    """Constructor keywords are a contract with the course and with users of other engines."""
    fields = dataclasses.fields(SamplingParams)
    assert {field.name: getattr(SamplingParams(), field.name) for field in fields} == DEFAULTS
    assert list(DEFAULTS) == [field.name for field in fields]


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name_and_value(name: str) -> None:
    """Type and range of each field: the message starts with the field's name and shows the value or its count."""
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name}") as caught:
            SamplingParams(**{name: value})
        if name == "stop_token_ids" and isinstance(value, list) and len(value) == 1:
            value = value[0]
        too_long = isinstance(value, list | dict) and len(value) > 16
        shown = f"{len(value)} " if too_long else repr(("",) if name == "stop" and value == "" else value)
        assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stop", ["ok", "x" * 257], "stop[1]: 'xxxx"),
        ("bad_words", ["x" * 257], "has 257 characters, at most 256 are allowed"),
        ("logit_bias", {-1: 0.0}, "logit_bias: -1 must be in [0, 2147483647]"),
        ("logit_bias", {"5": 0.0}, "logit_bias: '5' must be a whole number"),
        ("logit_bias", {5: 100.5}, "logit_bias[5]: 100.5 must be in [-100, 100]"),
        ("logit_bias", {5: NAN}, "logit_bias[5]: nan must be in [-100, 100]"),
        ("logit_bias", {5: True}, "logit_bias[5]: True must be a number in [-100, 100]"),
    ],
)
def test_an_element_is_refused_by_its_place(name: str, value: Any, message: str) -> None:
    """In a list of many the message says which one is wrong, and shortens it."""
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**{name: value})


def test_every_field_has_bad_values_in_this_test() -> None:
    """A field that is added without limits fails here."""
    assert list(BAD) == [field.name for field in dataclasses.fields(SamplingParams)]


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("temperature", "[0, 100]"),
        ("top_p", "(0, 1]"),
        ("min_tokens", "[0, max_tokens = 128]"),
        ("max_tokens", "[1, 2147483647]"),
    ],
)
def test_the_message_has_the_limit(name: str, limit: str) -> None:
    """A refusal must say what would have been accepted."""
    with pytest.raises(ValueError, match=re.escape(f"{name}: -1 must be in {limit}")):
        SamplingParams(**{name: -1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("temperature", 100), ("top_k", 1), ("top_p", 1e-9), ("top_p", 1), ("min_p", 0), ("min_p", 1),
     ("max_tokens", 1), ("max_tokens", 2**31 - 1), ("min_tokens", 128), ("seed", 0), ("seed", 2**64 - 1),
     ("stop_token_ids", [0, 2**31 - 1]), ("stop", []), ("ignore_eos", True), ("stop", ["x" * 256] * 16),
     ("presence_penalty", -2), ("frequency_penalty", 2), ("repetition_penalty", 0.01), ("repetition_penalty", 100),
     ("logit_bias", {0: -100, 2**31 - 1: 100}), ("logit_bias", {}), ("logprobs", 0), ("logprobs", 20), ("n", 128),
     ("prompt_logprobs", 0), ("bad_words", ["x" * 256] * 256), ("skip_special_tokens", False),
     ("include_stop_str_in_output", True)],
)  # fmt: skip
def test_the_limits_themselves_are_accepted(name: str, value: Any) -> None:
    """Both ends of every closed range work."""
    stored = getattr(SamplingParams(**{name: value}), name)
    assert stored == (tuple(value) if isinstance(value, list) else value)


def test_other_spellings_of_a_value_are_stored_as_one() -> None:
    """One stop string may come alone, and -1 is what other engines call no limit: whoever reads finds one form."""
    params = SamplingParams(stop="END", top_k=-1, logit_bias={np.int64(3): np.float32(0.5)})  # type: ignore[dict-item]
    assert (params.stop, params.top_k, params.logit_bias) == (("END",), 0, {3: 0.5})
    assert [(type(k), type(v)) for k, v in (params.logit_bias or {}).items()] == [(int, float)]
    assert params == SamplingParams(stop=["END"], top_k=0, logit_bias={3: 0.5})


def test_the_parameters_do_not_share_the_callers_collections() -> None:
    """What was checked is what is used: changing the dictionary or list afterwards changes nothing."""
    bias, stop = {1: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[2] = 5000.0
    stop.append("")
    assert (params.logit_bias, params.stop) == ({1: 1.0}, ("a",))
    assert isinstance(hash(params), int)


def test_min_tokens_is_limited_by_max_tokens() -> None:
    """The two contradict each other when min_tokens is larger, and the message shows both."""
    with pytest.raises(ValueError, match=r"min_tokens: 5 must be in \[0, max_tokens = 4\]"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=4, min_tokens=4).min_tokens == 4


def test_numpy_numbers_become_python_numbers() -> None:
    """Values from arrays are accepted and stored as plain int and float, so that they print and compare as such."""
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        stop_token_ids=[np.int32(7)],  # type: ignore[list-item]
    )
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 3, (7,))
    assert [type(params.temperature), type(params.top_k), type(params.stop_token_ids[0])] == [float, int, int]


@pytest.mark.parametrize("value", [10**5000, -(10**5000), "x" * 10**6], ids=["huge", "huge-negative", "long"])
def test_a_huge_value_gives_a_short_message(value: Any) -> None:
    """Error text reaches clients and logs: its length must not be the caller's choice."""
    with pytest.raises(ValueError, match=r"^seed: ") as caught:
        SamplingParams(seed=value)
    assert len(str(caught.value)) < 200


def test_parameters_are_frozen_and_comparable() -> None:
    """One object may serve many requests, so nobody may change it under them."""
    params = SamplingParams(stop_token_ids=[1, 2], top_k=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 6  # type: ignore[misc]
    assert params == SamplingParams(stop_token_ids=(1, 2), top_k=5)
    assert dataclasses.replace(params, top_k=6).stop_token_ids == (1, 2)
    assert hash(params) == hash(SamplingParams(stop_token_ids=(1, 2), top_k=5))


def test_temperature_zero_is_greedy_and_filters_are_known() -> None:
    """Which path a row takes through the sampler is decided by the parameters alone."""
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams().has_filters
    assert not SamplingParams().has_penalties
    assert all(
        SamplingParams(**field).has_penalties
        for field in ({"presence_penalty": 1}, {"frequency_penalty": -1}, {"repetition_penalty": 0.9})
    )
    assert all(
        SamplingParams(**field).has_filters for field in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1})
    )

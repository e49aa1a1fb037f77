"""Bodies: what two parsers could read differently never gets further."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoserve.server.errors import ApiError
from nanoserve.server.json_body import parse_json_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
def test_what_is_json_arrives(value: dict[str, object], is_ascii: bool) -> None:
    assert parse_json_object(json.dumps(value, ensure_ascii=is_ascii).encode(), 64) == value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', "'a' is there twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "beyond float64"),
        (b'{"a": ' + b"9" * 41 + b"}", "41 digits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"", "not JSON"),
        (b'{"a": 1} x', "line 1, column 10"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
        (b'{"a": ' + b'{"a": ' * 40 + b"1" + b"}" * 41, "deeper than 32"),
        (b"[" * 100_000, "deeper than 32"),
        (b'{"a":' * 100_000, "deeper than 32"),
        (b'{"a": [' + b"[]," * 600_000 + b"1]}", "more than 524288"),
    ],
    ids=range(18),
)
def test_what_is_not_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_json_object(body, 32)
    assert refused.value.status == 400
    assert words in refused.value.message


def test_nesting_up_to_the_limit_passes() -> None:
    body = b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}"
    assert parse_json_object(body, 32)


def test_many_duplicate_keys_cost_no_time() -> None:
    body = b"{" + b", ".join(b'"%d": 1' % i for i in range(200_000)) + b', "199999": 2}'
    begin = time.perf_counter()
    with pytest.raises(ApiError, match="twice"):
        parse_json_object(body, 32)
    assert time.perf_counter() - begin < 5

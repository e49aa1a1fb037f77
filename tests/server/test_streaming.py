"""When the tokens of a stream are sent: together where they follow fast, and never late where somebody waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from tests.server.conftest import Running
from tests.server.test_ends import slow_down
from tests.server.test_openai_api import events

from nanoserve.server import engine_loop


def test_tokens_that_follow_fast_are_sent_together(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once, the last at once, and between them as often as the interval says."""
    monkeypatch.setattr(engine_loop, "INTERVAL_PER_JOB_S", 10.0)
    counts = {}
    for seconds in (0.0, 10.0):
        served = start(stream_interval_s=seconds)
        body = {
            "model": "tiny",
            "prompt": "def main",
            "max_tokens": 40,
            "temperature": 0,
            "return_token_ids": True,
        }
        choices = [
            event["choices"][0] for event in events(served, "/v1/completions", {**body, "stream": True})
        ]
        (whole,) = served.complete(**body)["choices"]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
        assert choices[0]["token_ids"] == whole["token_ids"][:1]
        counts[seconds] = len(choices)
    assert counts == {0.0: 40, 10.0: 2}


def test_few_streams_hear_of_their_tokens_sooner(start: Callable[..., Running]) -> None:
    served = start(stream_interval_s=10.0)
    body = {"model": "tiny", "prompt": "def main", "max_tokens": 40, "temperature": 0, "stream": True}
    assert len(list(events(served, "/v1/completions", body))) > 2


def test_tokens_do_not_wait_while_a_new_request_is_taken_in(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "INTERVAL_PER_JOB_S", 10.0)
    served = start(stream_interval_s=10.0)
    slow_down(served, monkeypatch, 0.02)
    body = {"model": "tiny", "prompt": "def main", "max_tokens": 40, "temperature": 0, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        time.sleep(0.2)  # some ten steps
        served.complete(prompt="a", max_tokens=1, temperature=0)
        steps = served.engine.get_stats()["steps"]
        assert b"data: {" in next(pieces)
        assert served.engine.get_stats()["steps"] - steps < 10  # told then, and not at the end
        assert b"[DONE]" in b"".join(pieces)

"""Rates and latencies from times that are written down, and the loop that takes them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanoserve.workloads import Timeline, WorkloadRequest, play
from nanoserve.workloads.timeline import RequestTimes, median_and_range, percentile


def timeline() -> Timeline:
    """Two requests: tokens at 1, 2, 3 and at 2, 4 seconds; the second was sent at 0.5."""
    return Timeline(
        [RequestTimes(10, 0.0, [7, 8, 9], [1.0, 2.0, 3.0]), RequestTimes(6, 0.5, [5, 6], [2.0, 4.0])], 4.0
    )


def test_metrics_by_hand() -> None:
    made = timeline().metrics()
    assert made["input_tokens_per_s"] == 16 / 4
    assert made["output_tokens_per_s"] == 5 / 4
    assert made["prefill_tokens_per_s"] == 16 / 2  # everyone has begun at 2
    assert made["decode_tokens_per_s"] == 2 / (4 - 2)  # the tokens at 3 and 4
    assert (made["ttft_p50_ms"], made["ttft_p99_ms"]) == (1000, 1500)
    assert (made["itl_p50_ms"], made["itl_p99_ms"]) == (1000, 2000)
    assert made["latency_p99_ms"] == 3500


def test_one_token_each_has_no_decoding() -> None:
    made = Timeline([RequestTimes(4, 0.0, [1], [0.5])], 0.5).metrics()
    assert (made["decode_tokens_per_s"], made["itl_p50_ms"]) == (None, None)
    assert made["prefill_tokens_per_s"] == 8


def test_percentiles_and_spread() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [percentile(values, rank) for rank in (0, 20, 21, 50, 99, 100)] == [1, 1, 2, 3, 5, 5]
    assert median_and_range(values) == {"median": 3, "min": 1, "max": 5}


def test_a_timeline_survives_the_pipe() -> None:
    held = json.loads(json.dumps(timeline().as_json()))
    assert Timeline.from_json(held, [(10, 3), (6, 2)]) == timeline()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("wall_s"), "not a timeline"),
        (lambda held: held["requests"].pop(), "requests: 1 were answered, 2 were asked"),
        (
            lambda held: held["requests"][1]["tokens"].append(1),
            r"requests\[1\]: 6 prompt tokens, 3 tokens at 2",
        ),
        (lambda held: held["requests"][0].update(prompt_tokens=9), r"requests\[0\]: 9 prompt"),
        (lambda held: held["requests"][0]["times_s"].reverse(), r"requests\[0\]: times_s are not in order"),
        (lambda held: held["requests"][0].update(sent_s=1.5), r"requests\[0\]: times_s are not in order"),
        (lambda held: held.update(wall_s=3.5), r"requests\[1\]: times_s are not in order"),
        (lambda held: held.update(wall_s=float("nan")), "not a time"),
        (lambda held: held.update(requests=3), "not a timeline"),
    ],
)
def test_what_is_no_timeline_is_refused(change: Any, message: str) -> None:
    held = timeline().as_json()
    change(held)
    with pytest.raises(ValueError, match=message):
        Timeline.from_json(held, [(10, 3), (6, 2)])


class CountingServer:
    """A token per request and step; a second per step."""

    def __init__(self, surplus: int = 0) -> None:
        self.now_s = 0.0
        self.most = 0
        self._left: dict[int, int] = {}
        self._surplus = surplus

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        self._left[key] = output_tokens + self._surplus

    def step(self) -> list[tuple[int, list[int]]]:
        self.now_s += 1
        self.most = max(self.most, len(self._left))
        came = [(key, [100 + key]) for key in self._left]
        self._left = {key: left - 1 for key, left in self._left.items() if left > 1}
        return came


def test_play_keeps_so_many_in_flight() -> None:
    server = CountingServer()
    requests = [WorkloadRequest([1, 2], output) for output in (1, 3, 2, 1)]
    played = play(server, requests, 2, clock=lambda: server.now_s)
    assert server.most == 2
    assert [one.sent_s for one in played.requests] == [0, 0, 1, 3]
    assert [one.times_s for one in played.requests] == [[1], [1, 2, 3], [2, 3], [4]]
    assert [one.tokens for one in played.requests] == [[100], [101] * 3, [102] * 2, [103]]
    assert played.wall_s == 4


def test_tokens_nobody_asked_for_are_an_error() -> None:
    server = CountingServer(surplus=1)
    with pytest.raises(RuntimeError, match="request 0: 1 tokens came, 0 were left"):
        play(server, [WorkloadRequest([1], 1), WorkloadRequest([1], 2)], 2)

"""Numbers of the server: what a client would measure itself."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from tests.server.conftest import Running, numbers
from tests.server.test_ends import wait_for

from nanoserve.server.logs import JsonLines
from nanoserve.server.metrics import Histogram


def test_counts_are_what_happened(served: Running) -> None:
    before = numbers(served.client)
    served.complete(prompt="some words to count", max_tokens=7, temperature=0)
    served.complete(prompt="some words to count", max_tokens=5, n=2, temperature=1.0)
    served.wait_until_idle()
    hits = "nanoserve:prefix_cache_hits_total"  # the engine tells of them behind an answer
    wait_for(lambda: numbers(served.client)[hits] > before.get(hits, 0.0))
    after = numbers(served.client)

    def more(name: str) -> float:
        return after[f"nanoserve:{name}"] - before.get(f"nanoserve:{name}", 0.0)

    assert more("generation_tokens_total") == 17
    assert more("prompt_tokens_total") == 2 * 19
    assert more("request_success_total,finished_reason=length") == 3
    assert more("time_to_first_token_seconds_count") == 2
    assert more("e2e_request_latency_seconds_count") == 2
    assert more("request_queue_time_seconds_count") == 2
    assert more("inter_token_latency_seconds_count") >= 6 + 2 * 4
    assert more("http_responses_total,route=/v1/completions,status=200") == 2
    assert after["nanoserve:num_requests_running"] == after["nanoserve:num_requests_waiting"] == 0
    assert 0 < more("time_to_first_token_seconds_sum") < more("e2e_request_latency_seconds_sum")


def test_a_histogram_counts_into_buckets() -> None:
    histogram = Histogram("h", "text", (1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, times)
    (family,) = [histogram.family()]
    buckets = {
        sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")
    }
    assert buckets == {"1.0": 3, "2.0": 4, "+Inf": 7}
    assert histogram.total == 0.5 + 2.0 + 1.5 + 27.0


def test_a_log_line_is_json() -> None:
    record = logging.LogRecord("nanoserve.access", logging.INFO, "", 0, "request %s", ("é\n",), None)
    record.fields = {"id": "1", "key": None}
    line = JsonLines().format(record)
    assert "\n" not in line
    told: dict[str, Any] = json.loads(line)
    assert told["message"] == "request é\n"
    assert told["id"] == "1"
    assert "key" not in told


def test_the_access_log_tells_of_a_request(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanoserve.access"):
        answer = served.post(
            "/v1/completions", {"model": "tiny", "prompt": "abc", "max_tokens": 3, "user": "me"}
        )
        served.wait_until_idle()

        def told() -> list[dict[str, Any]]:
            found = [getattr(record, "fields", {}) for record in caplog.records]
            return [fields for fields in found if fields.get("path") == "/v1/completions"]

        wait_for(lambda: bool(told()))  # it is written behind the answer
    (fields,) = told()
    assert fields["id"] == answer.headers["x-request-id"]
    assert (fields["status"], fields["prompt_tokens"], fields["output_tokens"], fields["user"]) == (
        200,
        3,
        3,
        "me",
    )
    assert 0 < fields["ttft"] <= fields["seconds"]
    assert "abc" not in str(fields)


def test_a_log_line_moves_no_terminal() -> None:
    record = logging.LogRecord("nanoserve.access", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": "/\x1b[2J\x9b2J\x7f\u202e\ud800"}
    line = JsonLines().format(record)
    assert line.isascii()
    assert "\x1b" not in line

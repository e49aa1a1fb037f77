"""Plain curl: what documentation shows, and nothing between it and the server."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from tests.server.conftest import Running

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


def curl(*arguments: str) -> str:
    return subprocess.run(
        ["curl", "-sS", "--max-time", "20", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_readmes_example(served: Running) -> None:
    body = {"model": "tiny", "prompt": "def main", "max_tokens": 40, "temperature": 0}
    header = ("-H", "Content-Type: application/json")
    whole = json.loads(curl(f"{served.url}/v1/completions", *header, "-d", json.dumps(body)))
    lines = curl(
        "-N", f"{served.url}/v1/completions", *header, "-d", json.dumps({**body, "stream": True})
    ).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert (
        "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        == whole["choices"][0]["text"]
    )


def test_a_body_of_another_type_is_refused(served: Running) -> None:
    """curl says x-www-form-urlencoded when it is told nothing: that is refused by name, not read as something else."""
    answer = json.loads(curl(f"{served.url}/v1/completions", "-d", '{"model": "tiny", "prompt": "a"}'))
    assert "application/json" in answer["error"]["message"]


def test_health_and_metrics(served: Running) -> None:
    assert json.loads(curl(f"{served.url}/health"))["status"] == "ready"
    assert "nanoserve:num_requests_running" in curl(f"{served.url}/metrics")
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{served.url}/health/live") == "200"


def test_large_uploads_are_asked_about_first(served: Running) -> None:
    """curl sends Expect: 100-continue with a large body; it gets its answer, and its body is read."""
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1, "ignored": "x" * 1_500_000})
    answer = subprocess.run(
        ["curl", "-sS", "--max-time", "20", f"{served.url}/v1/completions", "-H", "Content-Type: application/json", "--data-binary", "@-"],
        input=body, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 1

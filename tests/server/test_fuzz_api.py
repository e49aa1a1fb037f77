"""Schemathesis against /openapi.json: whatever it makes up, no answer is a 5xx, and the engine is clean afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.server.conftest import Running


def test_no_request_makes_a_server_error(start: Callable[..., Running], tmp_path: Path) -> None:
    served = start(max_body_bytes=100_000)
    schema = served.client.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/models/{name}"} <= set(
        schema["paths"]
    )
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "40",
        "--seed", "1", "--request-timeout", "60", "--phases", "examples,coverage,fuzzing", "--no-color", "--continue-on-failure",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=600,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    answers = served.server.metrics.answers
    assert (
        sum(count for (route, status), count in answers.items() if route.startswith("/v1/") and status == 200)
        >= 5
    ), answers
    assert not [status for (_, status), count in answers.items() if status >= 500]
    served.wait_until_idle()

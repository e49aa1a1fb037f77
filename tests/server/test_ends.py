"""However a request ends - its client goes, its time is up, the server stops - everything it had is free again, soon."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.conftest import Running, numbers

from nanoserve import LLM
from nanoserve.native import CudaDeviceLost

LONG = {"model": "tiny", "prompt": "def main", "max_tokens": 480, "ignore_eos": True, "temperature": 0}


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def connect(served: Running) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def slow_down(served: Running, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Each step takes at least that long."""
    executor, forward = served.engine.executor, type(served.engine.executor).forward

    def slowly(self: Any, batch: Any) -> Any:
        if self is executor:
            time.sleep(step_s)
        return forward(self, batch)

    monkeypatch.setattr(type(executor), "forward", slowly)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_client_that_goes_frees_everything(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, stream: bool, reset: bool
) -> None:
    served = start(engine={"max_num_seqs": 2})
    slow_down(served, monkeypatch, 0.005)
    clients = [connect(served) for _ in range(6)]  # two run, one is next, the others wait
    for client in clients:
        client.sendall(request_bytes({**LONG, "stream": stream}))
    gateway = served.server.gateway
    wait_for(lambda: gateway.num_running + gateway.num_waiting == 6)
    steps = served.engine.get_stats()["steps"]
    for client in clients:
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    served.wait_until_idle()
    assert served.engine.get_stats()["steps"] - steps < 480  # nobody was served to the end
    assert served.server.metrics.endings["abort"] == 6
    assert served.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_n_sequences_and_prompts_go_with_their_client(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(served, monkeypatch, 0.005)
    client = connect(served)
    client.sendall(request_bytes({**LONG, "prompt": ["a", "b"], "n": 4, "stream": True, "temperature": 1.0}))
    wait_for(lambda: served.server.gateway.num_running == 2)
    client.recv(100)
    client.close()
    served.wait_until_idle()


def test_time_is_up_while_waiting_and_while_running(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`following` waits in the engine, which has room for one more than runs; `late` in the queue behind it."""
    served = start(engine={"max_num_seqs": 1})
    gateway = served.server.gateway
    slow_down(served, monkeypatch, 0.02)

    def post(**fields: Any) -> httpx.Response:
        return served.post("/v1/completions", {**LONG, **fields})

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, timeout=4.0)
        wait_for(lambda: gateway.num_running == 1 and served.engine.get_stats()["steps"] > 0)
        following = pool.submit(post, queue_timeout=0.5)
        wait_for(lambda: gateway.num_running == 2)
        late = pool.submit(post, queue_timeout=0.01)
        for answer in (following.result(), late.result()):
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "queue_timeout")
            assert int(answer.headers["retry-after"]) >= 1
        other = pool.submit(post, queue_timeout=30, max_tokens=20)
        answer = first.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline_exceeded")
        assert other.result().status_code == 200
    served.wait_until_idle()
    assert served.server.metrics.refusals["queue_timeout"] == 2


def test_a_stream_whose_time_is_up_says_so(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(served, monkeypatch, 0.02)
    with served.client.stream(
        "POST", "/v1/completions", json={**LONG, "stream": True, "timeout": 3}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_a_slow_reader_holds_up_nobody(start: Callable[..., Running]) -> None:
    served = start(stall_timeout_s=0.3)
    slow = connect(served)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    # Large events, so that the sockets' buffers fill: log-probabilities of 20 alternatives.
    fields = {name: value for name, value in LONG.items() if name != "prompt"}
    body = {
        **fields,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 400,
        "logprobs": True,
        "top_logprobs": 20,
    }
    slow.sendall(request_bytes({**body, "stream": True, "n": 8, "temperature": 1.0}, "/v1/chat/completions"))
    wait_for(lambda: served.server.gateway.num_running > 0)
    began = time.monotonic()
    assert served.complete(prompt="a", max_tokens=4)["usage"]["completion_tokens"] == 4
    assert time.monotonic() - began < 5
    served.wait_until_idle()
    wait_for(lambda: served.server.metrics.refusals["stalled"] == 1, 30)
    wait_for(lambda: not _is_open(slow))
    slow.close()


def _is_open(client: socket.socket) -> bool:
    """Reads what there is; whether the other side has not hung up."""
    client.settimeout(0.05)
    try:
        while True:
            if not client.recv(1 << 20):
                return False
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def test_a_failing_step_takes_only_its_own(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start()
    executor, calls = served.engine.executor, []
    forward = executor.forward

    def failing(batch: Any) -> Any:
        calls.append(1)
        if any(request.prompt_tokens[0] == ord("!") for request in batch.requests):
            raise RuntimeError("secret internals at 0x7fffdeadbeef")
        return forward(batch)

    monkeypatch.setattr(type(executor), "forward", lambda self, batch: failing(batch))
    with ThreadPoolExecutor(8) as pool:
        good = [
            pool.submit(served.complete, prompt=f"{i} def", max_tokens=30, temperature=0) for i in range(6)
        ]
        bad = pool.submit(
            served.post, "/v1/completions", {"model": "tiny", "prompt": "!bad", "max_tokens": 5}
        )
        assert bad.result().status_code == 500
        assert "0x" not in bad.result().text
        assert "secret" not in bad.result().text
        assert all(one.result()["choices"][0]["finish_reason"] == "length" for one in good)
    served.wait_until_idle()
    assert served.client.get("/health").status_code == 200


def test_a_step_that_raises_as_a_whole_is_survived(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start()
    batcher = served.engine.batcher
    step, left = type(batcher).step, [1]

    def once(self: Any) -> Any:
        if self is batcher and left:
            left.pop()
            raise RuntimeError("a bug")
        return step(self)

    monkeypatch.setattr(type(batcher), "step", once)
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": "a"})
    assert answer.status_code == 500
    assert "a bug" not in answer.text
    assert served.complete(prompt="a", max_tokens=2)
    served.wait_until_idle()
    assert served.server.gateway.engine_loop.failed_steps == 1


def test_a_wedged_step_is_seen(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    served = start(wedged_after_s=0.2)
    executor, hold = served.engine.executor, threading.Event()
    forward = type(executor).forward

    def stuck(self: Any, batch: Any) -> Any:
        if self is executor:
            hold.wait(20)
        return forward(self, batch)

    monkeypatch.setattr(type(executor), "forward", stuck)
    client = connect(served)
    client.sendall(request_bytes({**LONG, "max_tokens": 2}))
    wait_for(lambda: served.client.get("/health").status_code == 503)
    told = served.client.get("/health/ready").json()
    assert told["status"] == "wedged"
    assert told["step_running_for"] > 0.2
    assert served.client.get("/health/live").status_code == 200
    assert served.post("/v1/completions", LONG).status_code == 503
    assert served.client.get("/metrics").status_code == 200
    hold.set()
    wait_for(lambda: served.client.get("/health").status_code == 200)
    client.close()
    served.wait_until_idle()


# ---- the process


def serve(checkpoint: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable,
        "-m",
        "nanoserve",
        "serve",
        str(checkpoint),
        "--port",
        "0",
        "--threads",
        "1",
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if '"listening"' in line:
            url = json.loads(line)["url"]
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, url
    raise AssertionError(f"it ended with {process.wait()}")


def test_sigterm_under_load_loses_no_accepted_request(checkpoint: Path) -> None:
    process, url = serve(checkpoint, "--max-num-seqs", "4", "--drain-timeout", "60")
    work = {**LONG, "n": 4, "temperature": 1.0}
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=url, timeout=60) as client:
        jobs = [
            pool.submit(client.post, "/v1/completions", json={**work, "prompt": f"{i}", "stream": i % 2 == 0})
            for i in range(16)
        ]

        wait_for(lambda: _num_arrived(client) == 16)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "draining"
        refused = client.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        answers = [job.result() for job in jobs]
    assert process.wait(20) == 0
    for answer in answers:
        assert answer.status_code == 200
        assert answer.text.count('"length"') == 4


def _num_arrived(client: httpx.Client) -> float:
    """Requests that are there, and that were and got an answer."""
    told = numbers(client)
    names = ("num_requests_running", "num_requests_waiting", "e2e_request_latency_seconds_count")
    return sum(told[f"nanoserve:{name}"] for name in names)


def test_what_is_not_done_in_time_is_told(checkpoint: Path) -> None:
    process, url = serve(checkpoint, "--max-num-seqs", "2", "--drain-timeout", "0.05")
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=url, timeout=60) as client:
        jobs = [
            pool.submit(client.post, "/v1/completions", json={**LONG, "n": 8, "temperature": 1.0})
            for i in range(12)
        ]
        wait_for(lambda: _num_arrived(client) == 12)
        process.send_signal(signal.SIGTERM)
        answers = [job.result() for job in jobs]
    assert process.wait(20) == 0
    codes = {answer.status_code for answer in answers}
    assert 503 in codes
    assert codes <= {200, 503}


def test_a_second_signal_ends_it_at_once(checkpoint: Path) -> None:
    process, url = serve(checkpoint, "--drain-timeout", "60", "--max-num-seqs", "1")
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(8):
            pool.submit(httpx.post, f"{url}/v1/completions", json={**LONG, "n": 16, "temperature": 1.0})
        wait_for(lambda: _num_arrived(client) > 2)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/health").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1  # far less than it had for those under way


def test_an_engine_that_cannot_go_on_ends_the_server(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients hear of it, then the process ends and is started again by whoever looks after it."""
    served = Running(LLM(checkpoint, num_threads=1, kv_cache_bytes=16 << 20))
    engine = served.engine

    def fails(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "step", fails)
    monkeypatch.setattr(engine, "abort", fails)
    answer = served.post("/v1/completions", LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    served.close()
    assert isinstance(served.failure, RuntimeError)


def test_a_lost_gpu_ends_the_server(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Running(LLM(checkpoint, num_threads=1, kv_cache_bytes=16 << 20))

    def forward(*args: Any) -> Any:
        raise CudaDeviceLost("an illegal memory access")

    monkeypatch.setattr(served.engine.executor, "forward", forward)
    answer = served.post("/v1/completions", LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    served.close()
    assert isinstance(served.failure, RuntimeError)


def test_a_slow_reader_has_the_drains_time(checkpoint: Path) -> None:
    """What the engine has made is not yet what the client has read."""
    process, url = serve(checkpoint, "--drain-timeout", "20")
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        body = {"model": checkpoint.name, "messages": [{"role": "user", "content": "x"}], "n": 16, "temperature": 1.0,
                "max_tokens": 400, "ignore_eos": True, "logprobs": True, "top_logprobs": 12}  # fmt: skip
        client.sendall(request_bytes({**body, "stream": True}, "/v1/chat/completions"))
        with httpx.Client(base_url=url, timeout=60) as other:
            wait_for(lambda: _num_arrived(other) == 1)
            wait_for(lambda: numbers(other)["nanoserve:num_requests_running"] == 0, 60)
        process.send_signal(signal.SIGTERM)
        time.sleep(3.5)
        received = b""
        while part := client.recv(1 << 20):
            received += part
    assert b"data: [DONE]" in received
    assert process.wait(20) == 0


def test_killed_and_started_again_it_serves(checkpoint: Path) -> None:
    process, url = serve(checkpoint)
    with httpx.Client(base_url=url, timeout=60) as client:
        before = client.post("/v1/completions", json={**LONG, "max_tokens": 20}).json()["choices"]
    process.kill()
    process.wait()
    begin = time.monotonic()
    process, url = serve(checkpoint)
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        assert time.monotonic() - begin < 40
        assert client.post("/v1/completions", json={**LONG, "max_tokens": 20}).json()["choices"] == before
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0

"""Clients that go, send ahead, do not read, or come in masses: what they had is free again, and nobody else notices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.server.conftest import Running
from tests.server.test_ends import LONG, connect, request_bytes, slow_down, wait_for

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("ahead", [HEALTH, HEALTH + request_bytes(LONG)], ids=["without body", "with body"])
def test_who_sent_ahead_and_goes_is_noticed(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, stream: bool, ahead: bytes
) -> None:
    served = start()
    slow_down(served, monkeypatch, 0.01)
    client = connect(served)
    client.sendall(request_bytes({**LONG, "stream": stream}))
    wait_for(lambda: served.server.gateway.num_running == 1)
    client.sendall(ahead)
    time.sleep(0.05)
    steps = served.engine.get_stats()["steps"]
    client.close()
    served.wait_until_idle()
    assert served.engine.get_stats()["steps"] - steps < 100
    assert served.server.metrics.endings == {"abort": 1}


def send_and_receive(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(65536)


def test_too_much_sent_ahead_ends_the_connection(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(served, monkeypatch, 0.005)
    for ahead in (HEALTH * 100, request_bytes({**LONG, "prompt": "x" * 300_000})):
        with connect(served) as client:
            client.sendall(request_bytes(LONG))
            wait_for(lambda: served.server.gateway.num_running == 1)
            client.settimeout(5)
            with pytest.raises(ConnectionError):  # not: an answer
                send_and_receive(client, ahead)
        served.wait_until_idle()


def ask_for_megabytes(served: Running, receive_buffer: int) -> socket.socket:
    """More than the sockets' buffers take."""
    client = connect(served)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.sendall(request_bytes({"prompt": "a" * 2_000_000, "return_token_strs": True}, "/tokenize"))
    return client


def test_an_answer_nobody_reads_ends(start: Callable[..., Running]) -> None:
    """Whole answers too: closing a connection waits until all is sent, which is never."""
    served = start(stall_timeout_s=0.3, keep_alive_s=1.0)
    with ask_for_megabytes(served, 4096):
        wait_for(lambda: served.server.metrics.refusals["stalled"] == 1, 20)
        wait_for(lambda: not served.server.connections)


def test_the_last_of_an_answer_nobody_reads_ends(start: Callable[..., Running]) -> None:
    """So little that writing it is never paused: only what came before it fills the kernel's buffers."""
    served = start(stall_timeout_s=0.3, keep_alive_s=30)
    answers = served.server.metrics.answers
    with connect(served) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wait_for(lambda: served.server.connections == 1)
        (connection,) = served.server._uvicorn.server_state.connections
        for number in range(1, 500):
            client.sendall(request_bytes({"tokens": [97] * 40_000}, "/detokenize"))
            wait_for(lambda number=number: answers["other", 200] == number)  # type: ignore[misc]
            if connection.transport.get_write_buffer_size():
                break
        assert not connection.flow.write_paused
        wait_for(lambda: not served.server.connections)
    assert served.server.metrics.refusals["stalled"] == 1


def test_an_answer_that_is_read_slowly_does_not(start: Callable[..., Running]) -> None:
    served = start(stall_timeout_s=3.0, keep_alive_s=5.0)
    with ask_for_megabytes(served, 1 << 18) as client:
        client.settimeout(10)
        received, until = len(client.recv(32768)), time.monotonic() + 6
        while time.monotonic() < until:
            received += len(client.recv(32768))
            time.sleep(0.05)
        assert served.server.connections  # it was long over the time in which nothing may be read
        while part := client.recv(1 << 20):
            received += len(part)
    assert received > 12_000_000
    assert not served.server.metrics.refusals["stalled"]


def test_who_goes_while_sending_is_no_error(start: Callable[..., Running]) -> None:
    served = start()
    with connect(served) as client:
        client.sendall(request_bytes(LONG)[:-5])
        time.sleep(0.1)
    wait_for(lambda: served.server.metrics.answers["/v1/completions", 499] == 1)
    assert not [status for _, status in served.server.metrics.answers if status >= 500]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_who_goes_while_its_text_is_prepared_never_gets_further(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    served = start()
    hold, done = threading.Event(), []
    encode = type(served.llm.tokenizer).encode

    def slowly(self: Any, *args: Any, **options: Any) -> Any:
        if self is served.llm.tokenizer:
            hold.wait(10)
            done.append(1)
        return encode(self, *args, **options)

    monkeypatch.setattr(type(served.llm.tokenizer), "encode", slowly)
    clients = [connect(served) for _ in range(5)]
    for client in clients:
        client.sendall(request_bytes({**LONG, "prompt": "a"}, path))
    threads = served.server.service.threads
    wait_for(lambda: threads.num_pending == 5)
    for client in clients:
        client.close()
    wait_for(lambda: threads.num_pending == 0)
    hold.set()
    served.wait_until_idle()
    wait_for(lambda: threads._threads._work_queue.qsize() == 0)
    assert len(done) <= 2  # those that had begun
    assert not served.server.metrics.endings
    assert served.server.metrics.queued.count == 0


def test_what_waits_to_be_prepared_is_bounded(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start(max_queue_requests=4, queue_timeout_s=3.0)
    hold = threading.Event()
    encode = type(served.llm.tokenizer).encode

    def slowly(self: Any, *args: Any, **options: Any) -> Any:
        if self is served.llm.tokenizer:
            hold.wait(20)
        return encode(self, *args, **options)

    monkeypatch.setattr(type(served.llm.tokenizer), "encode", slowly)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(served.post, "/v1/completions", {**LONG, "prompt": "a"}) for _ in range(4)]
        wait_for(lambda: served.server.service.threads.num_pending == 4)
        refused = served.post("/v1/completions", LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"]
        assert served.client.get("/health").status_code == 200
        late = [one.result() for one in waiting]
        hold.set()
    assert {(one.status_code, one.json()["error"]["code"]) for one in late} == {(503, "queue_timeout")}
    served.wait_until_idle()


def test_bodies_have_a_limit_together(start: Callable[..., Running]) -> None:
    served = start(max_pending_bytes=200_000)
    data = request_bytes({**LONG, "max_tokens": 1, "x": "y" * 150_000})
    first, second = connect(served), connect(served)
    bodies = served.server.service.bodies
    first.sendall(data[:-1])
    wait_for(lambda: bodies.pending_bytes > 100_000)
    second.sendall(data[:-1])
    second.settimeout(5)
    assert second.recv(65536).startswith(b"HTTP/1.1 503")
    assert served.complete(prompt="small", max_tokens=1)
    first.sendall(data[-1:])
    first.settimeout(5)
    assert first.recv(65536).startswith(b"HTTP/1.1 200")
    first.close()
    second.close()
    wait_for(lambda: bodies.pending_bytes == 0)


def test_a_large_body_stops_nobody(start: Callable[..., Running]) -> None:
    served = start()
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "x": [' + b'{"a":1},' * 250_000 + b"1]}"
    looks, stop = [0.0], threading.Event()

    def look() -> None:
        with httpx.Client(base_url=served.url) as client:
            while not stop.is_set():
                begin = time.monotonic()
                client.get("/health/live")
                looks.append(time.monotonic() - begin)

    worker = threading.Thread(target=look)
    worker.start()
    began = time.monotonic()
    answer = served.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    took = time.monotonic() - began
    stop.set()
    worker.join()
    assert answer.status_code == 200
    looks.sort()  # the slowest may be a pause of this machine's
    assert looks[-2] < max(0.1, took / 2), (looks[-3:], took)


def test_connections_have_a_limit(start: Callable[..., Running]) -> None:
    served = start(max_connections=4, keep_alive_s=30, read_timeout_s=30)
    clients = [connect(served) for _ in range(4)]
    wait_for(lambda: served.server.connections == 4)
    with connect(served) as more:
        more.settimeout(5)
        answer = more.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
    assert served.server.metrics.refusals["connections"] == 1
    for client in clients:
        client.close()
    wait_for(lambda: not served.server.connections)
    assert served.complete(prompt="a", max_tokens=1)


def test_a_body_that_does_not_arrive_is_told(start: Callable[..., Running]) -> None:
    served = start(read_timeout_s=2)
    with connect(served) as client:
        client.sendall(request_bytes(LONG)[:-5])
        client.settimeout(10)
        assert client.recv(65536).startswith(b"HTTP/1.1 408")


def test_logging_ends_though_nobody_reads() -> None:
    """A pipe that is full and stays so must not keep the process from ending."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 65536)
    except BlockingIOError:
        os.set_blocking(writer, True)
    code = (
        "import logging; from nanoserve.server.logs import start_logging\n"
        "log = start_logging('info', True)\n"
        "for i in range(20000): logging.getLogger('nanoserve').error('x')\n"
        "log.stop()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=writer, env=environment, timeout=30, check=False
    )
    assert done.returncode == 0
    os.close(reader)
    os.close(writer)

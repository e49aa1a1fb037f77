"""What every request passes: keys, hosts, limits. Denying is the default, on every route there is."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.routing import Route
from tests.server.conftest import Running
from tests.server.test_ends import connect, request_bytes, slow_down, wait_for

from nanoserve.server.guard import OPEN_ROUTES, OPEN_WITH_PAGE
from nanoserve.server.settings import ApiKey, ServerSettings

KEYS = (ApiKey("alice", "alice-secret"), ApiKey("bob", "bob-secret-2"))


@pytest.fixture(scope="module")
def locked(start: Callable[..., Running]) -> Running:
    return start(api_keys=KEYS, max_requests_per_key=2)


def routes(served: Running) -> list[tuple[str, str]]:
    app: Any = served.server.app._app
    return [
        (method, route.path.replace("{name:path}", "tiny"))
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def test_every_route_but_health_and_the_empty_page_needs_a_key(locked: Running) -> None:
    listed = routes(locked)
    assert {"/v1/completions", "/metrics", "/engine/state", "/openapi.json", "/v1/models"} <= {
        path for _, path in listed
    }
    for method, path in listed:
        answer = locked.client.request(method, path)
        if path in OPEN_ROUTES | OPEN_WITH_PAGE:
            assert answer.status_code == 200, path
        else:
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
    assert locked.client.get("/nothing/here").status_code == 401  # not even whether there is such a route


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer wrong", "Bearer alice-secre", "Bearer alice-secrett", "Basic alice-secret", "alice-secret",
     "Bearer alice-secret bob-secret-2", "Bearer \xff\xfe"],
)  # fmt: skip
def test_wrong_keys(locked: Running, value: str) -> None:
    headers = {"Authorization": value.encode("latin-1")}
    assert locked.client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("value", ["Bearer alice-secret", "bearer  bob-secret-2"])
def test_right_keys(locked: Running, value: str) -> None:
    assert locked.client.get("/v1/models", headers={"Authorization": value}).status_code == 200


def test_keys_do_not_find_each_others_prompts(locked: Running) -> None:
    body = {"model": "tiny", "prompt": "a prompt that is some pages long: " * 4, "max_tokens": 1}

    def cached(secret: str) -> int:
        answer = locked.post("/v1/completions", body, headers={"Authorization": f"Bearer {secret}"})
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("alice-secret") == 0
    assert cached("alice-secret") > 64
    assert cached("bob-secret-2") == 0
    assert cached("bob-secret-2") > 64
    locked.wait_until_idle()


def test_keys_share_prompts_where_it_is_wanted(start: Callable[..., Running]) -> None:
    served = start(api_keys=KEYS, share_prefix_cache=True)
    body = {"model": "tiny", "prompt": "a prompt that is some pages long: " * 4, "max_tokens": 1}
    found = [
        served.post("/v1/completions", body, headers={"Authorization": f"Bearer {key.secret}"}).json()[
            "usage"
        ]["prompt_tokens_details"]
        for key in KEYS
    ]
    assert found[0]["cached_tokens"] == 0
    assert found[1]["cached_tokens"] > 64


def test_a_key_has_its_share_and_no_more(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(locked, monkeypatch, 0.008)
    long = {"model": "tiny", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "n": 4, "temperature": 1.0}
    clients = [connect(locked) for _ in range(2)]
    for client in clients:
        data = request_bytes(long).replace(b"Host:", b"Authorization: Bearer alice-secret\r\nHost:")
        client.sendall(data)
    wait_for(lambda: locked.server.gateway._per_key[1] == 2)
    refused = locked.post("/v1/completions", long, headers={"Authorization": "Bearer alice-secret"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
    assert int(refused.headers["retry-after"]) >= 1
    with connect(locked) as unread:  # refusing costs little: nobody waits for the body, or reads it
        head, _, body = request_bytes(long).partition(b"\r\n\r\n")
        unread.sendall(head.replace(b"Host:", b"Authorization: Bearer alice-secret\r\nHost:") + b"\r\n\r\n")
        assert unread.recv(4096).startswith(b"HTTP/1.1 429 ")
        unread.sendall(body + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b'"status":' not in received:
            received += unread.recv(4096)
        assert b"HTTP/1.1 200 OK" in received
    other = locked.post(
        "/v1/completions", {**long, "max_tokens": 2}, headers={"Authorization": "Bearer bob-secret-2"}
    )
    assert other.status_code == 200
    for client in clients:
        client.close()
    locked.wait_until_idle()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("LOCALHOST:1", 200), ("evil.example", 421), ("localhost.evil.example", 421),
     ("", 421), ("127.0.0.1.evil.example:80", 421)],
)  # fmt: skip
def test_hosts(served: Running, host: str, status: int) -> None:
    assert served.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_settings_refuse_what_is_not_safe() -> None:
    with pytest.raises(ValueError, match=r"host: '0\.0\.0\.0'"):
        ServerSettings(host="0.0.0.0")
    ServerSettings(host="0.0.0.0", insecure=True)
    ServerSettings(host="0.0.0.0", api_keys=KEYS)
    with pytest.raises(ValueError, match="8 or more"):
        ServerSettings(api_keys=(ApiKey("a", "short"),))
    with pytest.raises(ValueError, match="same secret"):
        ServerSettings(api_keys=(ApiKey("a", "secret-12"), ApiKey("b", "secret-12")))
    with pytest.raises(ValueError, match="queue_timeout_s: 0"):
        ServerSettings(queue_timeout_s=0)
    with pytest.raises(ValueError, match="drain_timeout_s: inf"):
        ServerSettings(drain_timeout_s=float("inf"))
    assert "secret" not in repr(ApiKey("a", "secret-12"))


# ---- limits of the connection


def exchange(served: Running, data: bytes, seconds: float = 10.0) -> bytes:
    """What comes back until the server hangs up, or nothing more comes for a while."""
    with connect(served) as client:
        client.settimeout(seconds)
        received = b""
        try:
            client.sendall(data)
            while part := client.recv(65536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


def test_large_headers_are_refused(start: Callable[..., Running]) -> None:
    served = start(max_header_bytes=4096, read_timeout_s=1.0)
    for head in (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        + b"".join(b"X-%d: 1\r\n" % i for i in range(1000))
        + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20),
    ):
        answer = exchange(served, head, 3)
        assert answer.startswith(b"HTTP/1.1 431 ") or not answer, answer[:100]
        assert served.client.get("/health").status_code == 200
    body = request_bytes(
        {"model": "tiny", "prompt": "a" * 100, "max_tokens": 1, "user": "u" * 200, "x": "y" * 8000}
    )
    assert exchange(served, body, 2).startswith(b"HTTP/1.1 200 ")  # a large body is no large header


def test_large_bodies_are_refused_before_they_are_read(start: Callable[..., Running]) -> None:
    served = start(max_body_bytes=10_000)
    answer = served.client.post(
        "/v1/completions", content=b"x" * 10_001, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    answer = served.client.post(
        "/v1/completions", content=chunks(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_a_request_that_does_not_arrive_is_given_up(start: Callable[..., Running]) -> None:
    served = start(read_timeout_s=0.5)
    for data in (
        b"",
        b"GET /hea",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    ):
        begin = time.monotonic()
        answer = exchange(served, data)
        assert time.monotonic() - begin < 15
        assert b" 200 " not in answer


def test_pipelined_requests_are_answered_in_order(served: Running) -> None:
    one = request_bytes({"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0})
    last = one.replace(b"Host:", b"Connection: close\r\nHost:")
    received = exchange(served, one + one + last)
    assert received.count(b"HTTP/1.1 200 OK") == 3


def test_nonsense_harms_nobody(served: Running) -> None:
    for data in (
        b"\x00\x01\x02\x03" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\nHost: localhost\r\n\r\n",
    ):  # fmt: skip
        answer = exchange(served, data, 0.5)
        assert b" 500 " not in answer, data
        assert b"Traceback" not in answer
        assert served.client.get("/health").status_code == 200


def test_errors_tell_nothing_of_the_inside(served: Running) -> None:
    for body in (
        b"{",
        b"\xff",
        b"[]",
        b'{"model": "tiny"}',
        b'{"model": "tiny", "prompt": {"a": "/etc/passwd"}}',
    ):
        answer = served.client.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        for word in ("0x", "Traceback", "site-packages", str(served.llm.directory), "object at"):
            assert word not in answer.text


def test_an_idle_connection_is_closed(start: Callable[..., Running]) -> None:
    served = start(keep_alive_s=1.0)
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(5)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        received = b"more"
        while received:
            received = client.recv(65536)


def test_no_page_means_no_page(start: Callable[..., Running]) -> None:
    served = start(page=False)
    assert served.client.get("/").status_code == 404
    assert served.client.get("/engine/state").status_code == 404


def test_answers_have_no_cors(served: Running) -> None:
    answer = served.client.options(
        "/v1/models", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    )
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_state_of_the_engine_has_no_text(start: Callable[..., Running]) -> None:
    served = start()
    served.complete(prompt="a very secret prompt indeed, long enough for pages", max_tokens=2)
    assert "view" not in served.server.gateway.engine_loop.snapshot  # nobody looks, so nothing is drawn
    wait_for(lambda: "pages" in served.client.get("/engine/state").json())
    state = served.client.get("/engine/state").json()
    assert len(state["pages"]) <= 4096
    assert state["num_pages"] == served.engine.kv_pool.num_pages
    assert "secret" not in json.dumps(state)
    assert str(ord("v")) not in [str(one) for one in state.get("tokens", [])]


def test_a_socket_that_only_connects_is_no_request(served: Running) -> None:
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))):
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_probe_by_address_is_answered_and_tells_no_more(served: Running) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert served.client.get(path, headers={"Host": "10.1.2.3:8000"}).status_code == 200
    assert served.client.get("/metrics", headers={"Host": "10.1.2.3:8000"}).status_code == 421


def test_an_ipv6_host_goes_by_its_name_in_brackets() -> None:
    from nanoserve.server.guard import Guard
    from nanoserve.server.metrics import Metrics

    guard = Guard(lambda *_: None, ServerSettings(host="FD00::1", insecure=True), Metrics())  # type: ignore[arg-type,return-value]
    state: dict[str, Any] = {}
    guard._admit(
        {"path": "/v1/models", "headers": [(b"host", b"[fd00::1]:8000")], "state": state, "type": "http"}
    )


@pytest.mark.parametrize(
    "path", ["/v1/completions/", "/health/", "//health", "/health/../v1/models", "/%2e%2e/health"]
)
def test_other_spellings_of_a_path_are_no_path(served: Running, path: str) -> None:
    """And no redirect to where the Host header says, with the key."""
    data = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert exchange(served, data).startswith(b"HTTP/1.1 404 ")


def test_no_spelling_of_a_path_opens_it(locked: Running) -> None:
    for path in (
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "//v1/models",
        "/health%2f../v1/models",
        "/v1/models?/health",
    ):
        data = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        assert exchange(locked, data).startswith(b"HTTP/1.1 401 "), path

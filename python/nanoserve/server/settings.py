"""ServerSettings: every limit of the server, in one place, with its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from nanoserve.checks import shown, whole_number
from nanoserve.sampling import MAX_N

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_KEYS = 1024


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A secret that opens the server, and the name its owner goes by in logs and metrics."""

    name: str
    secret: str

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"  # a secret must not end in a log


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server allows.

    Args:
        host, port: where it listens; a host beyond loopback needs `api_keys` or `insecure`. Port 0 takes a free one.
        api_keys: who may use it; none: everybody who reaches it.
        insecure: serve other machines without keys.
        allowed_hosts: names the Host header may have besides loopback's and `host`; "*" allows all.
        model_name: the model's name in answers; None takes the checkpoint's.
        share_prefix_cache: let keys find each other's prompts in the prefix cache. Who does can tell by the time an answer
            takes whether somebody else sent a prompt.
        page: serve the page at / and what it shows of the engine.
        max_body_bytes, max_header_bytes, max_json_depth: of one request. max_pending_bytes: of all bodies together that are
            being read or prepared, the first 16 KiB of each not counted. max_connections: open at once.
        max_n: sequences per prompt. max_prompts: of one call of /v1/completions. max_sequences: of one call, prompts times n.
        max_queue_requests, max_queue_tokens: what may wait for the engine, in requests and in their prompt and output tokens.
        max_requests_per_key: waiting and running requests of one key.
        queue_timeout_s: longest wait for the engine; request_timeout_s: longest time in all. A request may ask for less.
        read_timeout_s: for a request to arrive whole. stall_timeout_s: how long a client may take next to nothing of its answer.
        stream_interval_s: for how long tokens of a stream may be kept to be sent together while many stream (with few, less);
            0 sends each by itself. The first one and the last ones never wait. Waking a stream and writing to it costs more than
            the token.
        keep_alive_s: how long a connection may be idle.
        drain_timeout_s: what running requests get to finish after SIGTERM.
        wedged_after_s: a step that takes longer makes the server unhealthy.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[ApiKey, ...] = ()
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    model_name: str | None = None
    share_prefix_cache: bool = False
    page: bool = True
    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_json_depth: int = 64
    max_pending_bytes: int = 64 * 2**20
    max_connections: int = 1000
    max_n: int = 16
    max_prompts: int = 64
    max_sequences: int = 256
    max_queue_requests: int = 256
    max_queue_tokens: int = 1_000_000
    max_requests_per_key: int = 128
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    read_timeout_s: float = 30.0
    stall_timeout_s: float = 60.0
    stream_interval_s: float = 0.1
    keep_alive_s: float = 30.0
    drain_timeout_s: float = 30.0
    wedged_after_s: float = 60.0

    def __post_init__(self) -> None:
        whole_number("port", self.port, 0, 65535)
        for name, low, high in (
            ("max_body_bytes", 1024, 2**30),
            ("max_header_bytes", 1024, 2**20),
            ("max_json_depth", 4, 256),
            ("max_pending_bytes", 1024, 2**40),
            ("max_connections", 1, 2**20),
            ("max_n", 1, MAX_N),
            ("max_prompts", 1, 1024),
            ("max_sequences", 1, 2**20),
            ("max_queue_requests", 1, 2**20),
            ("max_queue_tokens", 1, 2**40),
            ("max_requests_per_key", 1, 2**20),
        ):
            whole_number(name, getattr(self, name), low, high)
        for field in fields(self):
            if field.name.endswith("_s"):
                _seconds(field.name, getattr(self, field.name), or_zero=field.name == "stream_interval_s")
        if len(self.api_keys) > MAX_KEYS:
            raise ValueError(f"api_keys: {len(self.api_keys)} keys, at most {MAX_KEYS} are allowed")
        for at, key in enumerate(self.api_keys):
            if len(key.secret) < 8 or not key.secret.isascii() or not key.secret.isprintable():
                raise ValueError(f"api_keys[{at}]: must be 8 or more printable ASCII characters")
        for what in ("name", "secret"):
            if len({getattr(key, what) for key in self.api_keys}) < len(self.api_keys):
                raise ValueError(f"api_keys: two have the same {what}")
        if not self.is_loopback and not self.api_keys and not self.insecure:
            raise ValueError(
                f"host: {shown(self.host)} is reached from other machines: give an API key, or say insecure if you mean it"
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


def _seconds(name: str, value: Any, or_zero: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 7 * 86400 or not (value or or_zero) or not math.isfinite(value):
        raise ValueError(
            f"{name}: {shown(value)} must be seconds in {'[' if or_zero else '('}0, {7 * 86400}]"
        )

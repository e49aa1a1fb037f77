"""llama.cpp's llama-server over its own HTTP on this machine: token ids in, a stream of tokens out.

One thread reads all streams with a selector, so that the client costs as little as it can.
"""

from __future__ import annotations

import atexit
import json
import selectors
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from bench.peers.drivers.channel import run_driver

START_S = 300
UNTOLD = -1  # an id the server does not tell


@dataclass
class Stream:
    """One request's answer as it comes: server-sent events, in chunks."""

    key: int
    output_tokens: int
    count: int = 0  # tokens that came
    raw: bytes = b""  # of an event that is not complete

    def feed(self, chunk: bytes) -> list[int]:
        """The tokens of the events that are complete now.

        Raises:
            RuntimeError: the server refused the request.
        """
        *events, self.raw = (self.raw + chunk).split(b"\n\n")
        came: list[int] = []
        for event in events:
            _, data, text = event.partition(b"data: ")
            if not data:
                if not event.startswith(b"HTTP/1.1 200"):
                    _refuse(event)
                continue
            held = json.loads(text.partition(b"\r\n")[0].partition(b"\n")[0])
            if "error" in held:
                _refuse(text)
            # No event comes for a token whose text ends inside a character; the next one counts it.
            counted = held["tokens_predicted"] - self.count
            told = held.get("tokens", [])[:counted]
            came += [UNTOLD] * (counted - len(told)) + told
            self.count += counted
        return came


def _refuse(raw: bytes) -> None:
    raise RuntimeError(f"llama-server answered {raw[:300].decode(errors='replace')}")


class LlamaServer:
    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        body = json.dumps(
            {"prompt": prompt, "n_predict": output_tokens, "ignore_eos": True, "temperature": 0, "top_k": 1,
             "samplers": ["top_k"], "cache_prompt": True, "stream": True, "return_tokens": True}
        ).encode()  # fmt: skip
        head = (
            f"POST /completion HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        connection.sendall(head.encode() + body)
        self._selector.register(connection, selectors.EVENT_READ, Stream(key, output_tokens))

    def step(self) -> list[tuple[int, list[int]]]:
        came = []
        for ready, _ in self._selector.select(timeout=60):
            stream: Stream = ready.data
            connection: Any = ready.fileobj
            chunk = connection.recv(65536)
            tokens = stream.feed(chunk)
            if tokens:
                came.append((stream.key, tokens))
            if not chunk or stream.count == stream.output_tokens:
                if stream.count < stream.output_tokens:
                    raise RuntimeError(
                        f"request {stream.key}: the stream ended after {stream.count} tokens: {stream.raw!r:.300}"
                    )
                self._selector.unregister(connection)
                connection.close()
        return came


def load(options: dict[str, Any]) -> tuple[LlamaServer, dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slots = min(options["max_num_seqs"], options.get("slots", 32))
    threads = str(options["threads"])
    kv_type = "f32" if options["width"] == "float32" else "f16"
    command = [
        options["binary"], "-m", options["model"], "-t", threads, "-tb", threads, "-c", str(options["kv_cache_tokens"]),
        "-np", str(slots), "--kv-unified", "-b", "2048", "-ub", "512", "-fa", "on", "-ctk", kv_type, "-ctv", kv_type,
        "--host", "127.0.0.1", "--port", str(port), "--no-webui", *options.get("arguments", []),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=2, stdin=subprocess.DEVNULL)
    atexit.register(process.terminate)
    deadline = time.monotonic() + START_S
    while not _is_healthy(port):
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"llama-server was not ready after {START_S} s")
        time.sleep(0.2)
    told = subprocess.run([options["binary"], "--version"], capture_output=True, text=True, check=False)
    version = next(
        (line for line in (told.stderr + told.stdout).splitlines() if "version" in line), "unknown"
    )
    return LlamaServer(port), {"version": version.strip(), "arithmetic": options["width"], "slots": slots}


def _is_healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


if __name__ == "__main__":
    run_driver(load)

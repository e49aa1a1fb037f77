"""Measures a server that is asked for several times what it can do, and writes bench/results/overload.json.

    python -m bench.overload MODEL [--seconds 120] [--times 5]

First the server's capacity: as many requests at once as it runs, again and again, give a rate. Then clients arrive at `--times`
that rate, at random (Poisson), whatever becomes of those before them, for `--seconds`. Reported: what was answered 200, 429
and otherwise, how long those answered 200 took, with half the capacity as the yardstick, whether /health was true throughout, and
the server's memory at the beginning and the end.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.run import RESULTS, commit, machine
from bench.serving import percentile, requests


def start_server(model: str, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """The process and its port."""
    command = [sys.executable, "-m", "nanoserve", "serve", model, "--port", "0", "--no-access-log", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r'"url": "http://127\.0\.0\.1:(\d+)"', line):
            return process, int(found[1])
    raise RuntimeError(f"the server ended with {process.wait()}")


PROBE_S = 0.5


class Client:
    """One request over a connection of its own."""

    def __init__(self, port: int, body: bytes, path: str = "POST /v1/completions") -> None:
        self.began = time.perf_counter()
        self.seconds = 0.0
        self.status = 0  # 0: it was hung up on
        self.path = path
        self._begin = b""
        head = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection = socket.create_connection(("127.0.0.1", port))
        self.connection.sendall(head.encode() + body)
        self.connection.setblocking(False)

    def receive(self) -> bool:
        """Whether more is to come."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        self._begin += data[: 16 - len(self._begin)]
        if not data:
            self.seconds = time.perf_counter() - self.began
            words = self._begin.split(b" ", 2)
            self.status = int(words[1]) if len(words) > 2 else 0
            self.connection.close()
        return bool(data)


class Clients:
    """Many of them, in one thread, by epoll: what they cost is taken from the server's cores."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self.num_open = 0

    def ask(self, body: bytes, path: str = "POST /v1/completions") -> None:
        client = Client(self._port, body, path)
        self._selector.register(client.connection, selectors.EVENT_READ, client)
        self.num_open += 1

    def ended(self, timeout: float) -> list[Client]:
        """Those whose answers are there, after at most so many seconds."""
        done = []
        for key, _ in self._selector.select(timeout) if self.num_open else ():
            if not key.data.receive():
                self._selector.unregister(key.fileobj)
                self.num_open -= 1
                done.append(key.data)
        if not self.num_open:
            time.sleep(max(0.0, min(timeout, 0.001)))
        return done


def arrivals(port: int, bodies: list[bytes], per_s: float, seconds: float) -> dict[str, Any]:
    """Requests that arrive at a rate, whatever becomes of those before them."""
    rng = np.random.default_rng(0)
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    unhealthy = number = 0
    clients = Clients(port)
    now = at = probe = time.perf_counter()
    until = now + seconds
    while at < until or clients.num_open:
        now = time.perf_counter()
        while at <= now and at < until:
            clients.ask(bodies[number % len(bodies)])
            number += 1
            at += rng.exponential(1 / per_s)
        if probe <= now < until:
            clients.ask(b"", "GET /health")
            probe = now + PROBE_S
        for client in clients.ended(max(0.0, at - now) if at < until else 1.0):
            if client.path == "GET /health":
                unhealthy += client.status != 200
                continue
            statuses[client.status] += 1
            if client.status == 200:
                taken.append(client.seconds)
    return {
        "arrivals": number, "per_s": per_s, "seconds": seconds, "statuses": dict(sorted(statuses.items())), "unhealthy_probes": unhealthy,
        "p50_s": percentile(taken, 0.5), "p99_s": percentile(taken, 0.99), "served_per_s": len(taken) / seconds,
    }  # fmt: skip


def capacity(port: int, bodies: list[bytes], at_once: int, seconds: float) -> float:
    """Requests per second with always so many at once."""
    done = number = 0
    until = time.perf_counter() + seconds
    clients = Clients(port)
    while time.perf_counter() < until:
        while clients.num_open < at_once:
            clients.ask(bodies[number % len(bodies)])
            number += 1
        for client in clients.ended(1.0):
            assert client.status == 200, client.status
            done += 1
    while clients.num_open:
        clients.ended(1.0)
    return done / seconds


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a checkpoint directory with a tokenizer")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--times", type=float, default=5)
    arguments = parser.parse_args()
    vocab = json.loads(Path(arguments.model, "config.json").read_text())["vocab_size"]
    bodies = [
        json.dumps(
            {
                "model": Path(arguments.model).name,
                "prompt": prompt,
                "max_tokens": 64,
                "temperature": 0,
                "ignore_eos": True,
            }
        ).encode()
        for prompt in requests(vocab, 64, 64, 0)
    ]
    server, port = start_server(
        arguments.model, ["--max-num-seqs", "16", "--max-queue", "16", "--kv-cache", "512MiB"]
    )
    try:
        most = capacity(port, bodies, 16, 10)
        calm = arrivals(port, bodies, most / 2, min(20.0, arguments.seconds))
        before = resident(server.pid)
        storm = arrivals(port, bodies, arguments.times * most, arguments.seconds)
        after = resident(server.pid)
        again = arrivals(port, bodies, most / 2, min(20.0, arguments.seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
    results = {
        "command": "python -m bench.overload", "commit": commit(), "machine": machine(), "model": Path(arguments.model).name,
        "seconds": arguments.seconds, "times": arguments.times, "capacity_per_s": most, "half": calm, "overload": storm, "half_again": again,
        "resident_before_bytes": before, "resident_after_bytes": after, "exit_code": ended,
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    (RESULTS / "overload.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

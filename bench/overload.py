"""Measures a server that is asked for several times what it can do, and writes bench/results/overload.json.

    python -m bench.overload MODEL [--seconds 120] [--times 5]

First the server's capacity: as many requests at once as it runs, again and again, give a rate. Then clients arrive at `--times`
that rate, at random (Poisson), whatever becomes of those before them, for `--seconds`. Reported: what was answered 200, 429
and otherwise, how long those answered 200 took, with half the capacity as the yardstick, whether /health was true throughout, and
the server's memory at the beginning and the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.run import RESULTS, commit, machine
from bench.serving import percentile, requests, start_server


async def ask(port: int, body: bytes, path: str = "POST /v1/completions") -> int:
    """The status of one request on a connection of its own, its answer read to the end; 0 if it was hung up on."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        while more := await reader.read():
            answer += more
        writer.close()
        return int(answer.split(b" ", 2)[1])
    except (OSError, IndexError):
        return 0


async def arrivals(port: int, bodies: list[bytes], per_s: float, seconds: float) -> dict[str, Any]:
    """Requests that arrive at a rate, each on its own."""
    rng = np.random.default_rng(0)
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    unhealthy = 0
    running: set[asyncio.Task[None]] = set()

    async def one(body: bytes) -> None:
        begin = time.perf_counter()
        status = await ask(port, body)
        statuses[status] += 1
        if status == 200:
            taken.append(time.perf_counter() - begin)

    async def watch() -> None:
        nonlocal unhealthy
        while True:
            unhealthy += await ask(port, b"", "GET /health") != 200
            await asyncio.sleep(0.5)

    watcher = asyncio.create_task(watch())
    until, at, number = time.perf_counter() + seconds, time.perf_counter(), 0
    while at < until:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        task = asyncio.create_task(one(bodies[number % len(bodies)]))
        running.add(task)
        task.add_done_callback(running.discard)
        at += rng.exponential(1 / per_s)
        number += 1
    await asyncio.gather(*running)
    watcher.cancel()
    return {
        "arrivals": number, "per_s": per_s, "statuses": dict(sorted(statuses.items())), "unhealthy_probes": unhealthy,
        "p50_s": percentile(taken, 0.5), "p99_s": percentile(taken, 0.99), "served_per_s": len(taken) / seconds,
    }  # fmt: skip


async def capacity(port: int, bodies: list[bytes], clients: int, seconds: float) -> float:
    """Requests per second with always so many at once."""
    done = 0
    until = time.perf_counter() + seconds

    async def one(number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            assert await ask(port, bodies[number]) == 200
            done += 1

    await asyncio.gather(*(one(number) for number in range(clients)))
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
        most = asyncio.run(capacity(port, bodies, 16, 10))
        calm = asyncio.run(arrivals(port, bodies, most / 2, min(20.0, arguments.seconds)))
        before = resident(server.pid)
        storm = asyncio.run(arrivals(port, bodies, arguments.times * most, arguments.seconds))
        after = resident(server.pid)
        again = asyncio.run(arrivals(port, bodies, most / 2, min(20.0, arguments.seconds)))
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

"""Measures what HTTP adds to the engine, and writes bench/results/serving.json.

    python -m bench.serving MODEL [MODEL ...] [--clients 32] [--rounds 5] [--quantization int8]

For each checkpoint (with a tokenizer) requests of one size - as many as there are clients, all at once, greedy, EOS ignored - are
served two ways, in turns, by one engine in one process: `LLM.generate` while nobody asks the server, and the server with a
streaming client for each request, over loopback. (Two processes differ by more than HTTP costs: by the memory they got.)
The clients are one process that only counts events, on the same cores: what it costs is part of what is lost. Reported: both
rates and their ratio, time to the first event and between events as clients see them, and the CPU time of the server's event
loop per streamed token.
"""

from __future__ import annotations

import argparse
import json
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.run import RESULTS, commit, machine

SERVER = """
import asyncio, json, sys, threading, time
from nanoserve import LLM, SamplingParams
from nanoserve.server.run import Server
from nanoserve.server.settings import ServerSettings
path, options = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(path, **options)

def tell(**what):
    print(json.dumps(what), flush=True)

def offline():
    for line in sys.stdin:
        prompts, output = json.loads(line)
        begin = time.perf_counter()
        done = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
        taken = time.perf_counter() - begin
        tell(seconds=taken, tokens=sum(len(one.token_ids) for one in done))

async def serve():
    server = Server(llm, ServerSettings(port=0), on_listening=lambda url: tell(port=int(url.rpartition(":")[2])))
    threading.Thread(target=offline, daemon=True).start()
    await server.serve()

asyncio.run(serve())
"""


WARM_UP = 2  # rounds that are not counted


class Client:
    """One streaming request over a connection of its own."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._data, self._port = head.encode() + data, port
        self.times: list[float] = []  # of events
        self.began = 0.0
        self._has_begun = False

    def send(self) -> socket.socket:
        self.began = time.perf_counter()
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.sendall(self._data)
        connection.setblocking(False)
        return connection

    def receive(self, connection: socket.socket) -> bool:
        """Whether more is to come."""
        data = connection.recv(65536)
        if not self._has_begun and b" 200 " not in data[:16]:
            raise RuntimeError(f"the server answered {data[:2000]!r}")
        self._has_begun = True
        self.times += [time.perf_counter()] * data.count(b"data: {")
        return bool(data)


def stream_all(clients: list[Client]) -> None:
    """All at once, in this thread, by epoll: what clients cost is taken from the engine's cores."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.send(), selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if not key.data.receive(key.fileobj):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


def requests(vocab: int, count: int, prompt: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(300, vocab - 8, (count, prompt)).tolist()  # type: ignore[no-any-return]


def cpu_seconds(pid: int) -> float:
    """Of the thread that runs the event loop: the process's first."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    engine: dict[str, Any] = {"max_num_seqs": arguments.clients, "kv_cache_bytes": arguments.kv_cache}
    if arguments.quantization:
        engine["quantization"] = arguments.quantization
    vocab = json.loads(Path(model, "config.json").read_text())["vocab_size"]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, model, json.dumps(engine)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    port = json.loads(server.stdout.readline())["port"]
    rounds: list[dict[str, float]] = []
    firsts: list[float] = []
    between: list[float] = []
    try:
        for number in range(-WARM_UP, arguments.rounds):
            # Of one size, but not the same ones, which the prefix cache would know the second time.
            alone_prompts, prompts = (
                requests(vocab, arguments.clients, arguments.prompt, 2 * (number + WARM_UP) + way)
                for way in (0, 1)
            )
            server.stdin.write(json.dumps([alone_prompts, arguments.output]) + "\n")
            server.stdin.flush()
            alone = json.loads(server.stdout.readline())
            bodies = [
                {
                    "model": Path(model).name, "prompt": prompt, "max_tokens": arguments.output, "temperature": 0, "ignore_eos": True,
                    "stream": True, "stream_options": {"include_usage": True},
                }
                for prompt in prompts
            ]  # fmt: skip
            clients = [Client(port, body) for body in bodies]
            cpu = cpu_seconds(server.pid)
            begin = time.perf_counter()
            stream_all(clients)
            taken = time.perf_counter() - begin
            cpu = cpu_seconds(server.pid) - cpu
            if number < 0:
                continue
            tokens = arguments.clients * arguments.output
            rounds.append(
                {
                    "offline_tokens_per_s": alone["tokens"] / alone["seconds"],
                    "http_tokens_per_s": tokens / taken,
                    "ratio": (tokens / taken) / (alone["tokens"] / alone["seconds"]),
                    "event_loop_us_per_token": 1e6 * cpu / tokens,
                }
            )
            firsts += [client.times[0] - client.began for client in clients]
            between += [
                b - a for client in clients for a, b in zip(client.times, client.times[1:], strict=False)
            ]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    made = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name, values in (("ttft", firsts), ("between_events", between)):
        made |= {
            f"{name}_p50_ms": 1e3 * percentile(values, 0.5),
            f"{name}_p99_ms": 1e3 * percentile(values, 0.99),
        }
    return {**made, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="+", help="checkpoint directories with a tokenizer")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--output", type=int, default=256, help="tokens out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache", type=int, default=2 << 30)
    parser.add_argument("--quantization", choices=["int8"])
    arguments = parser.parse_args()
    path = RESULTS / "serving.json"
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    results |= {"command": "python -m bench.serving", "commit": commit(), "machine": machine()}
    for model in arguments.model:
        name = f"{Path(model).name}, {arguments.quantization or 'bfloat16'}"
        results["models"][name] = {
            "clients": arguments.clients, "prompt_tokens": arguments.prompt, "output_tokens": arguments.output,
            **measure(model, arguments),
        }  # fmt: skip
        print(name, {key: value for key, value in results["models"][name].items() if key != "rounds"})
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measures what HTTP adds to the engine, and writes bench/results/serving.json.

    python -m bench.serving MODEL [MODEL ...] [--clients 32] [--rounds 3] [--quantization int8]

For each checkpoint (with a tokenizer) the same requests - as many as there are clients, all at once, greedy, EOS ignored - are
served two ways, in turns, on the same threads: `LLM.generate` in a process of its own, and `nanoserve serve` with a streaming
client for each, over loopback. The clients are one asyncio process that only counts bytes, on the same cores: what it costs is
part of what is lost. Reported: both rates and their ratio, time to the first event and between events as clients see
them, and the CPU time of the server's event loop per streamed token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.run import RESULTS, commit, machine

OFFLINE = """
import json, sys, time
import numpy as np
from nanoserve import LLM, SamplingParams
path, options, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llm = LLM(path, **options)
for line in sys.stdin:
    prompts, output = json.loads(line)
    begin = time.perf_counter()
    done = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
    taken = time.perf_counter() - begin
    print(json.dumps({"seconds": taken, "tokens": sum(len(one.token_ids) for one in done)}), flush=True)
"""


class Client:
    """One streaming request over a connection of its own."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self._port, self._body = port, json.dumps(body).encode()
        self.times: list[float] = []  # of events
        self.began = 0.0

    async def run(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(self._body)}\r\n\r\n"
        )
        self.began = time.perf_counter()
        writer.write(head.encode() + self._body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the server answered {status!r}: {await reader.read(2000)!r}")
        while data := await reader.read(65536):
            now = time.perf_counter()
            self.times += [now] * data.count(b"data: {")
        writer.close()


def requests(vocab: int, count: int, prompt: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(300, vocab - 8, (count, prompt)).tolist()  # type: ignore[no-any-return]


def start_server(model: str, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "nanoserve", "serve", model, "--port", "0", "--no-access-log", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r'"url": "http://127\.0\.0\.1:(\d+)"', line):
            return process, int(found[1])
    raise RuntimeError(f"the server ended with {process.wait()}")


def cpu_seconds(pid: int) -> float:
    """Of the thread that runs the event loop: the process's first."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    engine: dict[str, Any] = {"max_num_seqs": arguments.clients, "kv_cache_bytes": arguments.kv_cache}
    flags = ["--max-num-seqs", str(arguments.clients), "--kv-cache", str(arguments.kv_cache)]
    if arguments.quantization:
        engine["quantization"] = arguments.quantization
        flags += ["--quantization", arguments.quantization]
    vocab = json.loads(Path(model, "config.json").read_text())["vocab_size"]
    offline = subprocess.Popen(
        [sys.executable, "-c", OFFLINE, model, json.dumps(engine), str(arguments.clients)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    server, port = start_server(model, flags)
    rounds: list[dict[str, float]] = []
    firsts: list[float] = []
    between: list[float] = []
    try:
        assert offline.stdin is not None
        assert offline.stdout is not None
        for number in range(arguments.rounds + 1):
            prompts = requests(vocab, arguments.clients, arguments.prompt, number)
            offline.stdin.write(json.dumps([prompts, arguments.output]) + "\n")
            offline.stdin.flush()
            alone = json.loads(offline.stdout.readline())
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
            asyncio.run(_all(clients))
            taken = time.perf_counter() - begin
            cpu = cpu_seconds(server.pid) - cpu
            if number == 0:
                continue  # both are warm from here on
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
        offline.stdin.close()
        offline.wait(30)
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    made = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name, values in (("ttft", firsts), ("between_events", between)):
        made |= {
            f"{name}_p50_ms": 1e3 * percentile(values, 0.5),
            f"{name}_p99_ms": 1e3 * percentile(values, 0.99),
        }
    return {**made, "rounds": rounds}


async def _all(clients: list[Client]) -> None:
    await asyncio.gather(*(client.run() for client in clients))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="+", help="checkpoint directories with a tokenizer")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--output", type=int, default=128, help="tokens out")
    parser.add_argument("--rounds", type=int, default=3)
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

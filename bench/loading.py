"""Measures what loading a checkpoint costs, and writes bench/results/loading.json.

    python -m bench.loading [--shapes Qwen3-0.6B Llama-3.2-1B]

For each shape a bfloat16 checkpoint with random weights is written to a temporary directory, then loaded by processes of their
own that generate a few tokens:

    cold      no kernel is compiled yet, no packed weights are cached
    packing   kernels are there, the weight cache is off
    warm      kernels and packed weights are there, all files in the page cache; RUNS times, the median counts

The yardstick of a warm start is how long the same process takes to read as many bytes from the page cache with as many
threads, by the best way to do it: into a small buffer that stays in the core's cache. Times begin when `nanoserve` is imported,
for a process without it has nothing of its own to be blamed for; the import is told apart. Peak memory is the operating system's count for that process (VmHWM), the file's mapped
pages included; it is compared with what has to be there: packed weights and KV pool. One more process loads the same file with
transformers too, in float32, and compares greedy tokens and log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.random_checkpoint import write_random_checkpoint
from bench.run import RESULTS, commit, machine
from bench.shapes import SHAPES
from nanoserve import ModelConfig
from nanoserve.models.weights import checkpoint_shapes

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
KV_BYTES = 256 * 2**20
RUNS = 5
# What a warm start may take: this often the time of reading its bytes, and so much for everything else.
WARM_FACTOR, WARM_REST_S = 1.5, 0.5


def load_and_generate(directory: str, *, weight_cache: bool = True) -> dict[str, Any]:
    """In the measured process: load, generate, report."""
    begin = time.perf_counter()
    from nanoserve import LLM, SamplingParams

    imported = time.perf_counter()
    base = _memory("VmRSS")
    llm = LLM(directory, kv_cache_bytes=KV_BYTES, weight_cache=weight_cache)
    loaded = time.perf_counter()
    executor = llm.engine.executor
    if executor.weight_writer is not None:
        executor.weight_writer.join()
    written = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    prompts = [[(37 * i + j) % llm.config.vocab_size for j in range(PROMPT_TOKENS)] for i in range(4)]
    outputs = llm.generate(prompts, params)
    assert all(len(output.token_ids) == OUTPUT_TOKENS and output.error is None for output in outputs)
    return {
        "before_loading_bytes": base,
        "peak_bytes": _memory("VmHWM"),
        "kv_bytes": int(llm.engine.kv_pool.bytes_total),
        "weight_bytes": executor.weight_bytes,
        "weights_were_cached": executor.weights_were_cached,
        "import_s": imported - begin,
        "load_s": loaded - imported,
        "write_cache_s": written - loaded,
        "generate_s": time.perf_counter() - written,
        "threads": executor.num_threads,
    }


def warm_start(directory: str) -> dict[str, Any]:
    """`load_and_generate`, and then the yardstick: as many bytes of the same kind of file, all of it in the page cache."""
    told = load_and_generate(directory)
    file = max(Path(directory).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    size = min(told["weight_bytes"], file.stat().st_size)
    read_s = statistics.median(_read_s(file, size, told["threads"]) for _ in range(RUNS))
    return {**told, "read_s": read_s * told["weight_bytes"] / size}


def _read_s(file: Path, size: int, threads: int, each: int = 512 * 1024) -> float:
    """Seconds to read the first bytes of a file with that many threads, each into a buffer of its own."""
    fd = os.open(file, os.O_RDONLY)
    barrier = threading.Barrier(threads + 1)

    def read(number: int) -> None:
        buffer = bytearray(each)
        barrier.wait()
        for begin in range(number * each, size, threads * each):
            os.preadv(fd, [buffer], begin)

    workers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    os.close(fd)
    return time.perf_counter() - begin


def agreement(directory: str) -> dict[str, Any]:
    """In a process of its own: our tokens and log-probabilities against transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    from nanoserve import LLM, SamplingParams

    llm = LLM(directory, dtype="float32", kv_cache_bytes=KV_BYTES)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, llm.config.vocab_size, length).tolist() for length in (5, 70, 200)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    outputs = llm.generate(prompts, params)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    equal, worst = True, 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0]
        equal &= logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output.token_ids
        expected = torch.log_softmax(logits.double(), -1)
        for at, entry in enumerate([*(output.prompt_logprobs or [])[1:], *(output.logprobs or [])]):
            if entry is not None:
                worst = max(worst, abs(float(expected[at, entry.token]) - entry.logprob))
    return {"greedy_tokens_equal_transformers": equal, "largest_logprob_difference": worst}


def _memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str) -> dict[str, Any]:
    config_json = SHAPES[name]
    with tempfile.TemporaryDirectory(prefix="nanoserve-bench-") as directory:
        path = Path(directory) / "checkpoint"
        path.mkdir()
        cache = Path(directory) / "kernels"  # empty: the first run compiles
        cache.mkdir(mode=0o700)
        (path / "config.json").write_text(json.dumps(config_json))
        config = ModelConfig.from_pretrained(path)
        write_random_checkpoint(path, config_json, checkpoint_shapes(config), dtype="bfloat16")
        runs: dict[str, list[dict[str, Any]]] = {}
        for inside in ("cold", "packing", *["warm"] * RUNS, "compare"):
            output = subprocess.run(
                [sys.executable, "-m", "bench.loading", "--inside", inside, str(path)], capture_output=True, text=True,
                check=True, env={**os.environ, "NANOSERVE_CACHE_DIR": str(cache)},
            )  # fmt: skip
            runs.setdefault(inside, []).append(json.loads(output.stdout))
    (cold,), (packing,), (compared,) = runs["cold"], runs["packing"], runs["compare"]
    warm = sorted(runs["warm"], key=lambda run: run["load_s"])[RUNS // 2]
    assert all(run["weights_were_cached"] for run in runs["warm"])
    assert not cold["weights_were_cached"]
    assert not packing["weights_were_cached"]
    needed = warm["weight_bytes"] + warm["kv_bytes"]
    read_s = statistics.median(run["read_s"] for run in runs["warm"])
    allowed_s = WARM_FACTOR * read_s + WARM_REST_S
    return {
        **warm,
        **compared,
        "peak_over_needed": warm["peak_bytes"] / needed,
        "peak_over_weights": warm["peak_bytes"] / warm["weight_bytes"],
        "cold_peak_over_needed": cold["peak_bytes"] / needed,
        "packing_peak_over_needed": packing["peak_bytes"] / needed,
        "cold_load_s": cold["load_s"],
        "cold_import_s": cold["import_s"],
        "write_cache_s": cold["write_cache_s"],
        "packing_load_s": packing["load_s"],
        "warm_load_s": [run["load_s"] for run in runs["warm"]],
        "read_s": read_s,
        "load_over_read": warm["load_s"] / read_s,
        "allowed_load_s": allowed_s,
        "load_is_within_allowed": warm["load_s"] <= allowed_s,
        "load_gb_per_s": warm["weight_bytes"] / warm["load_s"] / 1e9,
    }


INSIDE: dict[str, Callable[[str], dict[str, Any]]] = {
    "cold": load_and_generate,
    "packing": lambda directory: load_and_generate(directory, weight_cache=False),
    "warm": warm_start,
    "compare": agreement,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        what, directory = args.inside
        print(json.dumps(INSIDE[what](directory)))
        return
    results: dict[str, Any] = {
        "command": "python -m bench.loading",
        "commit": commit(),
        "machine": machine(),
        "shapes": {},
    }
    for name in args.shapes:
        results["shapes"][name] = measure(name)
        print(name, json.dumps(results["shapes"][name], indent=1))
    (RESULTS / "loading.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

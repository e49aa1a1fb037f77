"""Measures the engine and writes bench/results/engine.json.

    python -m bench.run [--rounds 7]

Things that are compared run interleaved in the same process, round by round; reported are medians of the rounds and the
median of the per-round ratios, so that a machine whose speed drifts cannot favour one side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import workload
from nanoserve import (
    Batch,
    ModelConfig,
    NanoServingEngine,
    PageTable,
    Request,
    SamplingParams,
    random_weights,
)
from nanoserve.models.decoder import num_parameters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SMALL = ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64)
LONGER = ModelConfig(vocab_size=256, n_layer=4, n_head=6, n_embd=192, max_seq_len=4096)
LARGER = ModelConfig(vocab_size=256, n_layer=12, n_head=8, n_embd=512)
REQUESTS = 32


def machine() -> dict[str, Any]:
    cpu = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    flags: list[str] = []
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = next((value.strip() for name, value in fields.items() if name.strip() == "model name"), cpu)
        flags = next((value.split() for name, value in fields.items() if name.strip() == "flags"), [])
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": sorted(set(flags) & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "fma"}),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.system(),
    }


def commit() -> str:
    """Short; "unknown" of a copy of the tree without its history, or where git is not installed."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interleaved(rounds: int, works: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one round that is not counted."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work))
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def prompts(count: int, length: int) -> list[list[int]]:
    made: list[list[int]] = np.random.default_rng(1).integers(0, 256, (count, length)).tolist()
    return made


def recompute(engine: NanoServingEngine, prompt: list[int], count: int) -> list[int]:
    """What decoding costs without a KV cache: the whole sequence anew for every token. Same kernels, same answer."""
    tokens = list(prompt)
    for _ in range(count):
        request = Request("naive", tokens)
        request.page_table = PageTable(engine.kv_pool)
        request.page_table.grow_to(len(tokens))
        logits = engine.executor.forward(Batch.from_prefill([request]))
        request.page_table.release()
        tokens.append(int(logits.values[0].argmax()))
    return tokens[len(prompt) :]


def describe(config: ModelConfig) -> str:
    millions = num_parameters(config) / 1e6
    size = f" ({millions:.0f}M)" if millions >= 10 else ""
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide{size}"
    return f"{shape}, vocabulary {config.vocab_size}, float32"


def throughput(rounds: int) -> dict[str, Any]:
    """The 2-layer model, every way over all its tokens."""
    return _three_ways(SMALL, 64, 64, rounds, single=REQUESTS, naive=4, naive_tokens=64)


def other_shapes(rounds: int) -> dict[str, Any]:
    """The same where the balance differs: long prompts, and weights that do not fit the caches.

    The slow ways take long, so they get a part of the prompts and tokens.
    """
    rounds = max(3, rounds // 2)
    return {
        "long_prompts": _three_ways(LONGER, 512, 64, rounds, single=4, naive=2, naive_tokens=8),
        "weights_in_memory": _three_ways(LARGER, 32, 32, rounds, single=4, naive=2, naive_tokens=4),
    }


def _three_ways(
    config: ModelConfig,
    prompt_tokens: int,
    output: int,
    rounds: int,
    *,
    single: int,
    naive: int,
    naive_tokens: int,
) -> dict[str, Any]:
    """32 running requests, one at a time with KV cache, and one at a time recomputing, compared per output token.

    `single` and `naive` are how many of the prompts the slow ways get, `naive_tokens` how many tokens each of the latter.
    """
    weights = random_weights(config, seed=5)
    options: dict[str, Any] = {"kv_cache_pages": 2048, "enable_prefix_cache": False}
    batched = NanoServingEngine(config, weights, max_batch_size=REQUESTS, **options)
    alone = NanoServingEngine(config, weights, max_batch_size=1, **options)
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    asked = prompts(REQUESTS, prompt_tokens)
    answers = [request.output_tokens for request in batched.generate(asked, params)]
    assert answers[:single] == [request.output_tokens for request in alone.generate(asked[:single], params)]
    assert answers[0][:naive_tokens] == recompute(alone, asked[0], naive_tokens)
    batched.reset_stats()
    seconds = interleaved(
        rounds,
        {
            "batched": lambda: batched.generate(asked, params),
            "single": lambda: alone.generate(asked[:single], params),
            "naive": lambda: [recompute(alone, prompt, naive_tokens) for prompt in asked[:naive]],
        },
    )
    tokens = REQUESTS * output
    single_s = [value * REQUESTS / single for value in seconds["single"]]
    naive_s = [value * tokens / (naive * naive_tokens) for value in seconds["naive"]]
    stats = batched.get_stats()
    return {
        "model": describe(config),
        "running_requests": REQUESTS,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output,
        "output_tokens_per_s": tokens / statistics.median(seconds["batched"]),
        "one_at_a_time_tokens_per_s": tokens / statistics.median(single_s),
        "recompute_tokens_per_s": tokens / statistics.median(naive_s),
        "speedup_over_one_at_a_time": ratio(single_s, seconds["batched"]),
        "speedup_over_recompute": ratio(naive_s, seconds["batched"]),
        "avg_tokens_per_step": stats["avg_tokens_per_step"],
        "scheduler_us_per_request_step": stats["scheduler_us_per_request_step"],
        "sampler_us_per_request_step": stats["sampler_us_per_request_step"],
        "identical_tokens": True,
    }


def prefix_cache(rounds: int) -> dict[str, Any]:
    """The assistant workload with the radix tree on and off; a fresh tree every round."""
    description = workload.read_description()
    weights = random_weights(LONGER, seed=5)
    options: dict[str, Any] = {"kv_cache_pages": 2048, "max_batch_size": 8}
    on = NanoServingEngine(LONGER, weights, **options)
    off = NanoServingEngine(LONGER, weights, enable_prefix_cache=False, **options)
    answers: dict[str, Any] = {}

    def play(name: str, engine: NanoServingEngine) -> None:
        engine.radix_mgr.clear()
        engine.reset_stats()
        answers[name] = [conversation.answers for conversation in workload.serve(engine, description)]

    seconds = interleaved(
        max(2, rounds // 2), {"on": lambda: play("on", on), "off": lambda: play("off", off)}
    )
    assert answers["on"] == answers["off"], "the cache changed an answer"
    stats = on.get_stats()
    return {
        "workload": "bench/workloads/assistant.json",
        "model": describe(LONGER),
        "requests": sum(len(conversation) for conversation in answers["on"]),
        "cache_hit_rate": stats["cache_hit_rate"],
        "seconds_on": statistics.median(seconds["on"]),
        "seconds_off": statistics.median(seconds["off"]),
        "speedup": ratio(seconds["off"], seconds["on"]),
        "identical_answers": True,
    }


def kv_memory() -> dict[str, Any]:
    """Most KV bytes in use while serving, against reserving the model's full length for every running request."""
    weights = random_weights(SMALL, seed=5)
    engine = NanoServingEngine(SMALL, weights, kv_cache_pages=1024, enable_prefix_cache=False)
    rng = np.random.default_rng(2)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    lengths = np.minimum(rng.lognormal(3.5, 0.8, 128).astype(int) + 1, 900)
    for length in lengths:
        engine.add_request(rng.integers(0, 256, int(length)).tolist(), params)
    peak_pages, peak_requests, wasted = 0, 0, 0.0
    while engine.has_unfinished:
        engine.step()
        stats = engine.get_stats()
        if stats["kv_used"] > peak_pages:
            peak_pages, wasted = stats["kv_used"], stats["kv_internal_fragmentation"]
            peak_requests = stats["num_running"]
    page_bytes = engine.kv_pool.page_bytes
    contiguous = peak_requests * SMALL.max_seq_len * 4 * SMALL.kv_values_per_token
    return {
        "requests": len(lengths),
        "prompt_tokens_median": int(np.median(lengths)),
        "peak_running": peak_requests,
        "peak_kv_bytes": peak_pages * page_bytes,
        "contiguous_bytes": contiguous,
        "ratio": contiguous / (peak_pages * page_bytes),
        "internal_fragmentation_at_peak": wasted,
    }


_START = """
import sys, time
begin = time.perf_counter()
from nanoserve import LLM, SamplingParams
from nanoserve.kernels.library import stats
imported = time.perf_counter()
llm = LLM(sys.argv[1])
built = time.perf_counter()
llm.generate(["The"], SamplingParams(temperature=0, max_tokens=1))
print(imported - begin, built - imported, time.perf_counter() - built, stats().compiled)
"""


def start_up(rounds: int) -> dict[str, Any]:
    """The shipped model from a new process, with an empty and with a filled kernel cache."""
    cold, warm = [], []
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
    }
    for _ in range(max(2, rounds // 2)):
        with tempfile.TemporaryDirectory() as cache:
            os.chmod(cache, 0o700)
            for runs in (cold, warm):
                done = subprocess.run(
                    [sys.executable, "-c", _START, str(ROOT / "models" / "tiny-gpt")],
                    env={**env, "NANOSERVE_CACHE_DIR": cache}, capture_output=True, text=True, check=True,
                )  # fmt: skip
                runs.append([float(value) for value in done.stdout.split()])
    assert all(run[3] == 0 for run in warm), "a warm start compiled something"
    return {
        "model": "models/tiny-gpt",
        "kernels_compiled_cold": int(cold[0][3]),
        "kernels_compiled_warm": 0,
        "import_s": statistics.median(run[0] for run in warm),
        "cold_start_s": statistics.median(run[1] + run[2] for run in cold),
        "warm_start_s": statistics.median(run[1] + run[2] for run in warm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of the throughput measurement")
    rounds = parser.parse_args().rounds
    results: dict[str, Any] = {
        "command": f"python -m bench.run --rounds {rounds}",
        "commit": commit(),
        "machine": machine(),
    }
    for name, measure in (
        ("throughput", lambda: throughput(rounds)),
        ("other_shapes", lambda: other_shapes(rounds)),
        ("prefix_cache", lambda: prefix_cache(rounds)),
        ("kv_memory", kv_memory),
        ("start_up", lambda: start_up(rounds)),
    ):
        print(f"measuring {name} ...", flush=True)
        results[name] = measure()
        print(json.dumps(results[name], indent=1))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "engine.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written {(RESULTS / 'engine.json').relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""Where a step's time goes, and writes bench/results/profile.json.

    python -m bench.profile [--shape small --shape Qwen3-0.6B] [--width bfloat16 ...]

For each shape (random weights) and width: decoding with 128 tokens of context, 1 and 32 sequences at once, and prompts of 512
and 2,048 tokens, through `LLM` with the native executor's timings on. Shares are of the time of whole steps: what the kernels of
a kind take, and what is left, which is scheduling, sampling and Python. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.checkpoints import CHECKPOINTS
from bench.random_checkpoint import write_random_checkpoint
from bench.run import RESULTS, commit, machine
from nanoserve import LLM, ModelConfig, SamplingParams
from nanoserve.models.weights import checkpoint_shapes

WIDTHS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}
KINDS = {"head.weight": "head", "attention": "attention", "kv_write": "KV write"}
CONTEXT, STEPS = 128, 24
CASES = (
    ("decode-1", 1, CONTEXT),
    ("decode-32", 32, CONTEXT),
    ("prefill-512", 1, 512),
    ("prefill-2048", 1, 2048),
)


def kind(name: str) -> str:
    """Of an operation of the step, by its name."""
    bare = re.sub(r"^layers\.\d+\.", "", name)
    if bare in KINDS:
        return KINDS[bare]
    return "GEMM" if bare.endswith(".weight") and "norm" not in bare else "norms and the rest"


def measure(llm: LLM, count: int, prompt: int, seed: int) -> dict[str, float]:
    """Seconds by kind of the steps that count: those of decoding, or the prompt's own."""
    engine, decodes = llm.engine, prompt == CONTEXT
    prompts = np.random.default_rng(seed).integers(300, llm.config.vocab_size - 8, (count, prompt)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 1 if decodes else 1, ignore_eos=True)
    for tokens in prompts:
        engine.add_request(tokens, params)
    while decodes and not all(
        request.output_tokens for request in engine.batcher.scheduler.pool.live.values()
    ):
        engine.step()
    engine.executor.profile(True)
    begin = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    total = time.perf_counter() - begin
    spent: Counter[str] = Counter()
    for name, nanoseconds, _ in engine.executor.timings():
        spent[kind(name)] += 1e-9 * nanoseconds
    engine.executor.profile(False)
    return {**spent, "scheduling and sampling": total - sum(spent.values()), "total": total}


def profile(directory: str, width: str, rounds: int) -> dict[str, Any]:
    llm = LLM(directory, kv_cache_bytes=3 << 30, max_num_seqs=32, max_model_len=4096, **WIDTHS[width])
    made: dict[str, Any] = {}
    for case, count, prompt in CASES:
        measure(llm, count, prompt, 0)
        found = [measure(llm, count, prompt, 1 + number) for number in range(rounds)]
        steps = STEPS if prompt == CONTEXT else 1
        total = statistics.median(one["total"] for one in found)
        made[case] = {
            "step_ms": 1e3 * total / steps,
            "shares": {
                name: statistics.median(one.get(name, 0.0) / one["total"] for one in found)
                for name in found[0]
                if name != "total"
            },
        }
        print(Path(directory).name, width, case, made[case])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", choices=sorted(CHECKPOINTS), help="default: all")
    parser.add_argument("--width", action="append", choices=sorted(WIDTHS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python -m bench.profile", "commit": commit(), "machine": machine(), "context": CONTEXT, "shapes": {},
    }  # fmt: skip
    for shape in arguments.shape or list(CHECKPOINTS):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / shape
            directory.mkdir()
            raw = {**CHECKPOINTS[shape], "max_position_embeddings": 8192}
            (directory / "config.json").write_text(json.dumps(raw))
            config = ModelConfig.from_pretrained(directory)
            write_random_checkpoint(directory, raw, checkpoint_shapes(config), dtype="bfloat16")
            results["shapes"][shape] = {
                width: profile(str(directory), width, arguments.rounds)
                for width in arguments.width or list(WIDTHS)
            }
    (RESULTS / "profile.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

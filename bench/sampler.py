"""Measures what choosing a token costs and writes bench/results/sampler.json.

    python -m bench.sampler [--rounds 7]

Microseconds per row and step, for the vocabularies of Llama 2 (32,000) and Qwen 2 (151,936): one step of `BATCH` requests
that all ask for the same (or, `mixed`, for five things in turn), divided by their number. The rows are the logits of a peaked
distribution, as models make them: a few likely tokens over a broad tail, read with an engine's kernels and threads. The ways
run interleaved; reported is the median of the rounds, and what a step of `BATCH` requests spends that way in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.run import RESULTS, ROOT, commit, interleaved, machine
from nanoserve import Request, Sampler, SamplingParams
from nanoserve.kernels import logits as kernels
from nanoserve.kernels.library import load_kernels
from nanoserve.logits import Logits
from nanoserve.native import LogitsReader, StepExecutor, ThreadPool
from nanoserve.scheduling.scoring import score_tokens

BATCH = 32
PROMPT, OUTPUT = 512, 256  # tokens each request has
VOCABULARIES = (32_000, 151_936)
REPEATS = 4  # steps per timing
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k_top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "penalties_greedy": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
    "logit_bias_greedy": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(300), 1.0)},
    "penalties_temperature": {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
    "logprobs_greedy": {"temperature": 0.0, "logprobs": 5},
}
MIXED = ("greedy", "temperature", "top_k", "top_p", "min_p")


def rows(vocab: int) -> np.ndarray:
    """float32[BATCH, vocab]: a broad tail and fifty tokens above it, falling off like the ranks of words."""
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((BATCH, vocab)).astype(np.float32)
    for row in logits:
        row[rng.choice(vocab, 50, replace=False)] += 14 - 2 * np.log(np.arange(1, 51))
    return logits


def as_a_step_leaves_them(values: np.ndarray) -> Logits:
    """The rows in an executor's layout, with the kernels an engine has for them."""
    vocab = values.shape[1]
    stride = StepExecutor.logits_stride(vocab)
    sums, largest = (
        kernels.block_sums_spec(vocab, stride),
        kernels.block_max_spec(vocab, stride, may_forbid=True),
    )
    found = load_kernels([sums, largest])
    reader = LogitsReader(ThreadPool(), found[sums], found[largest], vocab, stride, kernels.BLOCKS_PER_UNIT)
    memory = np.zeros((len(values), stride), np.float32)
    memory[:, :vocab] = values
    return Logits(memory[:, :vocab], Logits.of(values).block_max, reader)


def requests(fields: dict[str, Any], vocab: int) -> list[Request]:
    made = []
    for index in range(BATCH):
        rng = np.random.default_rng(index)
        params = SamplingParams(seed=index, max_tokens=2 * OUTPUT, **fields)
        made.append(Request(index, rng.integers(0, vocab, PROMPT), params=params))
        for token in rng.integers(0, vocab, OUTPUT).tolist():
            made[-1].append_output(token)
    return made


def one_step(logits: Logits, batch: list[Request]) -> Callable[[], Any]:
    sampler, finite = Sampler(), [True] * BATCH

    def work() -> None:
        for _ in range(REPEATS):
            tokens = sampler.sample(logits, batch, (2,))
            score_tokens(batch, logits, tokens, finite, ())

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measured = {}
    for vocab in VOCABULARIES:
        logits = as_a_step_leaves_them(rows(vocab))
        batches = {name: requests(fields, vocab) for name, fields in WAYS.items()}
        batches["mixed"] = [batches[MIXED[i % len(MIXED)]][i] for i in range(BATCH)]
        seconds = interleaved(rounds, {name: one_step(logits, batch) for name, batch in batches.items()})
        measured[str(vocab)] = {
            name: round(1e6 * statistics.median(each) / (REPEATS * BATCH), 1)
            for name, each in seconds.items()
        }
    results: dict[str, Any] = {
        "command": f"python -m bench.sampler --rounds {rounds}",
        "commit": commit(),
        "machine": machine(),
        "batch": BATCH,
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "us_per_row_per_step": measured,
        "ms_per_step": {
            vocab: {name: round(us * BATCH / 1000, 3) for name, us in ways.items()}
            for vocab, ways in measured.items()
        },
    }
    print(json.dumps(results, indent=1))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sampler.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written {(RESULTS / 'sampler.json').relative_to(ROOT)}")


if __name__ == "__main__":
    main()

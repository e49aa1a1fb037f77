"""Measures what choosing a token costs and writes bench/results/sampler.json.

    python -m bench.sampler [--rounds 7]

Microseconds per row and step, for the vocabularies of Llama 2 (32,000) and Qwen 2 (151,936): one step of `BATCH` requests
that all ask for the same, divided by their number. The rows are the logits of a peaked distribution, as models make them:
a few likely tokens over a broad tail. The ways run interleaved; reported is the median of the rounds.
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
from nanoserve.scheduling.scoring import score_tokens

BATCH = 8
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
    "logprobs_greedy": {"temperature": 0.0, "logprobs": 5},
}


def rows(vocab: int) -> np.ndarray:
    """float32[BATCH, vocab]: a broad tail and fifty tokens above it, falling off like the ranks of words."""
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((BATCH, vocab)).astype(np.float32)
    for row in logits:
        row[rng.choice(vocab, 50, replace=False)] += 14 - 2 * np.log(np.arange(1, 51))
    return logits


def requests(fields: dict[str, Any], vocab: int) -> list[Request]:
    made = []
    for index in range(BATCH):
        rng = np.random.default_rng(index)
        params = SamplingParams(seed=index, max_tokens=2 * OUTPUT, **fields)
        made.append(Request(index, rng.integers(0, vocab, PROMPT), params=params))
        for token in rng.integers(0, vocab, OUTPUT).tolist():
            made[-1].append_output(token)
    return made


def one_step(fields: dict[str, Any], vocab: int) -> Callable[[], Any]:
    sampler, logits, batch = Sampler(), rows(vocab), requests(fields, vocab)
    finite = [True] * BATCH

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
        seconds = interleaved(rounds, {name: one_step(fields, vocab) for name, fields in WAYS.items()})
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
    }
    print(json.dumps(results, indent=1))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sampler.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written {(RESULTS / 'sampler.json').relative_to(ROOT)}")


if __name__ == "__main__":
    main()

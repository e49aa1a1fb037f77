"""transformers in float32 is the oracle: same greedy tokens, logits within 1e-4, however the work was scheduled."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from nanoserve import ModelConfig, NanoServingEngine, load_weights
from support.oracle import SHAPES, make_checkpoint, oracle_logits
from support.recording import greedy, record

NUM_PROMPTS, NUM_OUTPUT = 200, 8
SCHEDULES = list(
    itertools.product((1, 32), (7, 64, 512), (False, True))
)  # batch size, chunk size, prefix cache


@pytest.fixture(scope="module", params=sorted(SHAPES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("checkpoints"))


def random_prompts(vocab: int, count: int) -> list[list[int]]:
    """1..400 tokens; a third of them continue an earlier prompt, so that the prefix cache has something to find."""
    generator = np.random.default_rng(7)
    prompts: list[list[int]] = []
    for index in range(count):
        prompt = generator.integers(0, vocab, int(generator.integers(1, 401))).tolist()
        if index % 3 == 2:
            head = prompts[int(generator.integers(0, index))]
            prompt = (head[: int(generator.integers(1, len(head) + 1))] + prompt)[:400]
        prompts.append(prompt)
    return prompts


def test_greedy_tokens_and_logits_equal_transformers_under_every_schedule(checkpoint: Path) -> None:
    """200 random prompts, batched / chunked / cached in every combination, against one transformers forward each."""
    config = ModelConfig.from_pretrained(checkpoint)
    weights = load_weights(checkpoint)
    prompts = random_prompts(config.vocab_size, NUM_PROMPTS)
    expected: dict[int, tuple[list[int], np.ndarray]] = {}
    for batch_size, chunk_size, cache in SCHEDULES:
        engine = NanoServingEngine(
            config, weights, kv_cache_pages=1200, max_chunk_size=chunk_size, max_batch_size=batch_size,
            max_num_batched_tokens=600, enable_prefix_cache=cache,
        )  # fmt: skip
        recorder = record(engine)
        finished = engine.generate(prompts, greedy(NUM_OUTPUT, ignore_eos=True))
        if cache:
            assert engine.get_stats()["cache_hit_rate"] > 0.05
        for index, (prompt, request) in enumerate(zip(prompts, finished, strict=True)):
            if index not in expected:
                # One forward over prompt + our output: if each of our tokens is the oracle's argmax given those before it,
                # the oracle's own greedy continuation is the same, by induction.
                logits = oracle_logits(checkpoint, prompt + request.output_tokens)
                expected[index] = (logits[len(prompt) - 1 : -1].argmax(axis=1).tolist(), logits)
            tokens, logits = expected[index]
            schedule = f"prompt {index}, batch {batch_size}, chunk {chunk_size}, cache {cache}"
            assert request.output_tokens == tokens, schedule
            rows = recorder.rows[request.req_id]
            assert sorted(rows) == list(range(len(prompt) - 1, len(prompt) - 1 + NUM_OUTPUT)), schedule
            worst = max(float(np.abs(rows[at] - logits[at]).max()) for at in rows)
            assert worst < 1e-4, f"{schedule}: logits differ by {worst}"


def test_the_comparison_notices_a_wrong_weight(tmp_path: Path) -> None:
    """A model whose one bias is off by 0.01 must not pass as equal, or the oracle test could not fail."""
    path = make_checkpoint("gpt2", tmp_path)
    config, weights = ModelConfig.from_pretrained(path), dict(load_weights(path))
    name = next(name for name in weights if name.endswith("ln_f.bias"))
    weights[name] = weights[name] + np.float32(0.01)
    engine = NanoServingEngine(config, weights)
    recorder = record(engine)
    prompt = random_prompts(config.vocab_size, 1)[0]
    request = engine.generate([prompt], greedy(1))[0]
    expected = oracle_logits(path, prompt)[-1]
    assert np.abs(recorder.rows[request.req_id][len(prompt) - 1] - expected).max() > 1e-4

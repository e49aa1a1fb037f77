"""The same kind of chaos on the real model: what survives it has the tokens it has alone."""

from __future__ import annotations

import random
from functools import cache

from nanoserve import ModelConfig, NanoServingEngine, Request, random_weights
from support.recording import greedy

CONFIG = ModelConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32, max_seq_len=256)
WEIGHTS = {
    name: array * 8 if array.ndim == 2 else array for name, array in random_weights(CONFIG, seed=4).items()
}
PREFIXES = [[(7 * i + k) % 64 for i in range(40)] for k in range(3)]


@cache
def alone(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    engine = NanoServingEngine(CONFIG, WEIGHTS, enable_prefix_cache=False, num_threads=1)
    return engine.generate([list(prompt)], greedy(max_tokens))[0].output_tokens


def run(seed: int, operations: int) -> tuple[int, int]:
    """Random arrivals, aborts and steps on a pool of 8 pages; returns (requests that completed, preemptions)."""
    rng = random.Random(seed)
    engine = NanoServingEngine(
        CONFIG, WEIGHTS, kv_cache_pages=8, max_batch_size=6, max_chunk_size=rng.choice([1, 5, 16, 64]),
        max_num_batched_tokens=rng.choice([6, 20, 100]), policy=rng.choice(["fcfs", "sjf", "ljf", "lpm"]),
    )  # fmt: skip
    requests: list[Request] = []
    for _ in range(operations):
        action = rng.random()
        if action < 0.25 and len(engine.batcher.scheduler.pool.live) < 20:
            prefix = rng.choice(PREFIXES)[: rng.randrange(0, 41)]
            prompt = prefix + [rng.randrange(64) for _ in range(rng.randrange(1, 30))]
            requests.append(engine.add_request(prompt, greedy(rng.randrange(1, 40))))
        elif action < 0.30 and requests:
            engine.abort(rng.choice(requests).req_id)
        else:
            engine.step()
        engine.audit()
    while engine.has_unfinished:
        engine.step()
        engine.audit()
    completed = [request for request in requests if request.finish_reason == "length"]
    for request in completed:
        assert request.output_tokens == alone(tuple(request.prompt_tokens), request.max_tokens), (
            seed,
            request,
        )
    assert len(completed) + sum(request.finish_reason == "abort" for request in requests) == len(requests)
    preemptions: int = engine.get_stats()["preemptions"]
    engine.radix_mgr.clear()
    assert engine.kv_pool.num_free_pages == 8
    return len(completed), preemptions


def test_random_operations_on_the_real_model_keep_every_answer() -> None:
    """Sixteen runs of 150 operations: arrivals with shared prefixes, aborts, preemptions, evictions; audit after each step."""
    totals = [run(seed, 150) for seed in range(16)]
    assert sum(completed for completed, _ in totals) > 200
    assert sum(preemptions for _, preemptions in totals) > 40, (
        "the pools were not tight enough to test anything"
    )

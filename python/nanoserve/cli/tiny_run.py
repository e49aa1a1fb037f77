"""A tiny random model, compiled and run: `python -m nanoserve.cli.tiny_run`, which nanoserve doctor starts.

It exercises what a real model does: compile, store, load, prefill in chunks, decode, prefix cache. What is checked is what
must hold on any machine: the same prompt gives the same tokens from the cache as without it, and nothing is left behind.
"""

from __future__ import annotations

import time


def main() -> None:
    from nanoserve.kernels.library import stats
    from nanoserve.models.config import ModelConfig
    from nanoserve.models.weights import random_weights
    from nanoserve.nano_engine import NanoServingEngine
    from nanoserve.sampling import SamplingParams

    config = ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=32, max_seq_len=128)
    began = time.perf_counter()
    engine = NanoServingEngine(config, random_weights(config), kv_cache_pages=16, max_chunk_size=16)
    ready = time.perf_counter()
    prompt = [token % 64 for token in range(40)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (cold,) = engine.generate([prompt], params)
    (warm,) = engine.generate([prompt], params)
    engine.audit()
    if cold.error or len(cold.output_tokens) != 8:
        raise SystemExit(f"the model gave {len(cold.output_tokens)} of 8 tokens: {cold.error}")
    if cold.output_tokens != warm.output_tokens or not warm.prefix_hit_len:
        raise SystemExit("the same prompt gave other tokens from the prefix cache")
    print(
        f"{stats().compiled} kernels compiled in {ready - began:.1f} s, 16 tokens generated, cache and pool agree"
    )


if __name__ == "__main__":
    main()

"""Phase 6: the whole engine on a real model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import workload
from nanoserve import (
    LLM,
    ModelConfig,
    NanoServingEngine,
    RequestRefused,
    SamplingParams,
    load_weights,
    random_weights,
)
from support.oracle import load_oracle, make_checkpoint
from support.recording import greedy

CONFIG = ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights() -> Any:
    return {
        name: array * 6 if array.ndim == 2 else array
        for name, array in random_weights(CONFIG, seed=1).items()
    }


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def test_engine_creation_fills_the_pool_and_takes_nothing(weights: Any) -> None:
    """A new engine has all its pages free and no requests; sizes are the ones asked for."""
    engine = NanoServingEngine(config=CONFIG, weights=weights, kv_cache_pages=64, max_chunk_size=32)
    assert engine.kv_pool.num_free_pages == engine.kv_pool.num_pages == 64
    assert not engine.has_unfinished
    engine.audit()


@pytest.mark.parametrize(
    ("field", "value"),
    [("kv_cache_pages", 0), ("max_chunk_size", -1), ("max_batch_size", 0), ("max_num_batched_tokens", 8), ("page_size", 24),
     ("policy", "random"), ("eos_token_id", 256), ("num_threads", 0), ("max_model_len", 4096), ("kv_cache_pages", 2.5)],
)  # fmt: skip
def test_engine_refuses_sizes_it_cannot_honour(weights: Any, field: str, value: Any) -> None:
    """Each bad option is refused by its name and value."""
    with pytest.raises(ValueError, match=str(value)) as caught:
        NanoServingEngine(CONFIG, weights, **{field: value})
    assert field in str(caught.value)


def test_single_prompt_gets_the_asked_number_of_tokens(weights: Any) -> None:
    """One prompt, ten tokens, finish reason length, nothing left behind but the cached prefix."""
    engine = NanoServingEngine(CONFIG, weights)
    (request,) = engine.generate([[1, 2, 3, 4, 5]], greedy(10))
    assert len(request.output_tokens) == 10
    assert all(0 <= token < 256 for token in request.output_tokens)
    assert (request.finish_reason, request.is_finished, request.kv_pages) == ("length", True, [])
    engine.audit()


def test_many_prompts_come_back_in_prompt_order(weights: Any) -> None:
    """Forty prompts of different lengths through 8 seats: results line up with prompts and equal the single runs."""
    engine = NanoServingEngine(CONFIG, weights, max_batch_size=8)
    prompts = [prompt(1 + 7 * i % 90, i) for i in range(40)]
    finished = engine.generate(prompts, greedy(6))
    assert [request.prompt_tokens for request in finished] == prompts
    alone = NanoServingEngine(CONFIG, weights, max_batch_size=1, enable_prefix_cache=False)
    assert [r.output_tokens for r in finished] == [
        r.output_tokens for r in alone.generate(prompts, greedy(6))
    ]


def test_the_chapters_example_runs_as_printed(
    weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usage example of the README with ch16/ on the path and a torch state dict."""
    import torch

    torch.save(
        {name: torch.from_numpy(array.copy()) for name, array in weights.items()}, tmp_path / "model.pt"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "ch16"))
    scope: dict[str, Any] = {}
    exec(  # the text a reader would type
        "from nano_engine import NanoServingEngine, SamplingParams\n"
        "from executor import ModelConfig, load_weights\n"
        "config = ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64)\n"
        'engine = NanoServingEngine(config=config, weights=load_weights("model.pt"), kv_cache_pages=256, max_chunk_size=256)\n'
        "finished = engine.generate([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [10, 20, 30]],\n"
        "                           [SamplingParams(max_tokens=10, temperature=0.7) for _ in range(3)])\n"
        "stats = engine.get_stats()\n",
        scope,
    )
    assert [len(request.output_tokens) for request in scope["finished"]] == [10, 10, 10]
    assert {"cache_hit_rate", "avg_tokens_per_step"} <= scope["stats"].keys()
    assert scope["NanoServingEngine"] is NanoServingEngine


def test_a_300_token_prompt_is_chunked(weights: Any) -> None:
    """300 prompt tokens in chunks of 64 take five prefill steps and change nothing."""
    engine = NanoServingEngine(CONFIG, weights, max_chunk_size=64)
    chunked = engine.add_request(prompt(300), greedy(5))
    steps = 0
    while not chunked.output_tokens:
        engine.step()
        steps += 1
    assert steps == 5
    while engine.has_unfinished:
        engine.step()
    whole = NanoServingEngine(CONFIG, weights, max_chunk_size=512).generate([prompt(300)], greedy(5))[0]
    assert chunked.output_tokens == whole.output_tokens


def test_statistics_count_what_happened(weights: Any) -> None:
    """Tokens, steps, hits and requests add up to what was asked, and reset to zero."""
    engine = NanoServingEngine(CONFIG, weights)
    engine.generate([prompt(40), prompt(33, 1)], greedy(4))
    engine.generate([prompt(40)], greedy(4))
    stats = engine.get_stats()
    assert stats["num_finished"] == 3
    assert stats["output_tokens"] == 12
    assert stats["cache_hits"] == 32
    assert stats["cache_misses"] == 40 + 33 + 40 - 32
    assert stats["cache_hit_rate"] == pytest.approx(32 / 113)
    computed = (40 + 33 + 8) + 3 * 3  # prompts less what was cached, then three decode rows each
    assert stats["avg_tokens_per_step"] == pytest.approx(computed / stats["steps"])
    assert stats["kv_num_pages"] == 256
    engine.reset_stats()
    assert engine.get_stats()["steps"] == 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_cache_content_equals_the_oracles(name: str, tmp_path: Path) -> None:
    """Keys and values in the pages are transformers' past_key_values, layer by layer, position by position."""
    import torch

    path = make_checkpoint(name, tmp_path)
    config = ModelConfig.from_pretrained(path)
    engine = NanoServingEngine(config, load_weights(path), max_chunk_size=16)
    tokens = [token % config.vocab_size for token in prompt(70)]
    request = engine.add_request(tokens, greedy(4))
    while not request.output_tokens:
        engine.step()
    with torch.no_grad():
        past = load_oracle(path)(torch.tensor([tokens]), use_cache=True).past_key_values
    slots = request.page_table.slots(0, 70)
    for layer in range(config.n_layer):
        k, v = engine.kv_pool.get_layer_cache(layer)
        for ours, theirs in ((k, past.layers[layer].keys), (v, past.layers[layer].values)):
            held = ours[slots // 16, slots % 16]  # [token, head, dim]
            np.testing.assert_allclose(held, theirs[0].transpose(0, 1).numpy(), atol=1e-4)


def test_radix_chunking_and_batching_together(weights: Any) -> None:
    """Shared prefixes, chunks and decode rows in one mixed step; every answer equals the one given alone, cold."""
    engine = NanoServingEngine(
        CONFIG, weights, max_chunk_size=32, max_batch_size=6, max_num_batched_tokens=96
    )
    system = prompt(80)
    prompts = [system + prompt(10 + i, i) for i in range(12)]
    mixed = 0
    requests = [engine.add_request(p, greedy(12)) for p in prompts]
    while engine.has_unfinished:
        output = engine.step()
        kinds = {count > 1 for count in output.scheduled.values()}
        mixed += len(kinds) == 2
        engine.audit()
    assert mixed > 0, "no step had decode rows and chunks together"
    assert engine.get_stats()["cache_hit_rate"] > 0.3
    for request, asked in zip(requests, prompts, strict=True):
        cold = NanoServingEngine(CONFIG, weights, enable_prefix_cache=False, max_chunk_size=512)
        assert cold.generate([asked], greedy(12))[0].output_tokens == request.output_tokens


def test_throughput_of_a_batch_against_one_at_a_time(weights: Any) -> None:
    """Thirty-two requests together must be faster than one after another (the size of the gain is `make bench`'s)."""
    prompts = [prompt(32, i) for i in range(32)]
    # One thread each: waiting for a second one on a busy machine would measure the machine.
    options: dict[str, Any] = {"enable_prefix_cache": False, "num_threads": 1}
    together = NanoServingEngine(CONFIG, weights, max_batch_size=32, **options)
    alone = NanoServingEngine(CONFIG, weights, max_batch_size=1, **options)
    seconds: dict[str, list[float]] = {"together": [], "alone": []}
    for _ in range(5):
        for name, engine in (("together", together), ("alone", alone)):
            begin = time.process_time()
            engine.generate(prompts, greedy(24, ignore_eos=True))
            seconds[name].append(time.process_time() - begin)
    assert min(seconds["together"]) * 1.5 < min(seconds["alone"]), seconds


def test_realistic_workload_hits_the_cache_and_keeps_its_answers(weights: Any) -> None:
    """System prompts, few-shot blocks and multi-turn conversations: most prompt tokens are found, no answer changes."""
    config = ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64, max_seq_len=4096)
    weights = random_weights(config, seed=2)
    description = {**workload.read_description(), "conversations": 10}
    engine = NanoServingEngine(config, weights, kv_cache_pages=1500)
    with_cache = workload.serve(engine, description)
    engine.audit()
    assert engine.get_stats()["cache_hit_rate"] > 0.6
    without = workload.serve(
        NanoServingEngine(config, weights, kv_cache_pages=1500, enable_prefix_cache=False), description
    )
    assert [c.answers for c in with_cache] == [c.answers for c in without]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "prompt_tokens: empty"),
        ([1, 256], r"256.*\[0, 256\)"),
        ([1, -1], "-1"),
        ([1, 2.5], "2.5"),
        ([1, "x"], "'x'"),
        ([1] * 1025, "1025"),
    ],
)
def test_bad_prompts_are_refused_and_the_others_served(weights: Any, bad: list[Any], words: str) -> None:
    """Unknown ids, empty and over-long prompts get an error with value and limit; a running request never notices."""
    engine = NanoServingEngine(CONFIG, weights)
    good = engine.add_request(prompt(20), greedy(6))
    engine.step()
    with pytest.raises(ValueError, match=words):
        engine.add_request(bad, greedy(6))
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        engine.generate([prompt(5), bad], greedy(2))
    while engine.has_unfinished:
        engine.step()
    assert (
        good.output_tokens
        == NanoServingEngine(CONFIG, weights).generate([prompt(20)], greedy(6))[0].output_tokens
    )
    engine.audit()


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers(weights: Any) -> None:
    """What can never fit is told so at once, with pages needed and pages there."""
    engine = NanoServingEngine(CONFIG, weights, kv_cache_pages=4)
    with pytest.raises(RequestRefused, match=r"4 pages|pool"):
        engine.generate([prompt(100)], greedy(4))
    assert engine.generate([prompt(40)], greedy(4))[0].finish_reason == "length"


def test_a_request_that_goes_non_finite_fails_alone(weights: Any) -> None:
    """NaN weights at one position's embedding: that request ends with an error, its neighbour is untouched."""
    poisoned = {name: array.copy() for name, array in weights.items()}
    poisoned["wte.weight"][77] = np.nan
    poisoned = {**poisoned, "lm_head.weight": poisoned["wte.weight"]}
    config = ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64, tie_embeddings=False)
    poisoned["lm_head.weight"] = weights["wte.weight"].copy()
    engine = NanoServingEngine(config, poisoned)
    good = [token for token in prompt(50) if token != 77]
    bad = [*prompt(30), 77, 5]
    first, second = engine.generate([bad, good], SamplingParams(temperature=0, max_tokens=4, logit_bias=None))
    assert first.finish_reason == "error"
    assert "finite" in str(first.error)
    clean = NanoServingEngine(config, {**poisoned, "wte.weight": weights["wte.weight"]})
    assert second.output_tokens == clean.generate([good], greedy(4))[0].output_tokens
    for layer in range(2):
        assert all(np.isfinite(cache).all() for cache in engine.kv_pool.get_layer_cache(layer))
    engine.audit()


def test_the_shipped_model_speaks() -> None:
    """The trained byte-level model continues text with words: mostly letters and spaces, common words among them."""
    llm = LLM(ROOT / "models" / "tiny-gpt")
    outputs = llm.generate(
        ["The function ", "In this chapter, we will "], SamplingParams(temperature=0.0, max_tokens=120)
    )
    for output in outputs:
        assert output.text is not None
        words = output.text.split()
        assert sum(c.isalpha() or c == " " for c in output.text) / len(output.text) > 0.8
        assert sum(word in {"the", "a", "to", "of", "is", "and", "in", "that", "you"} for word in words) >= 3
        assert output.usage.completion_tokens == len(output.token_ids)

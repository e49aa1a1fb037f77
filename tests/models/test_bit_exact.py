"""A request's logits are the same bits alone or in company, chunked or whole, cached or not, preempted or not."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoserve import ModelConfig, NanoServingEngine, SamplingParams, load_weights, random_weights
from nanoserve.batch import Batch
from nanoserve.logits import Logits
from nanoserve.precision import choose_precision
from support.families import CASES
from support.oracle import make_checkpoint
from support.recording import RecordingExecutor, greedy, record

NUM_OUTPUT = 6
RANDOM = {
    "gpt2": ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64, max_seq_len=512),
    "llama": ModelConfig(
        vocab_size=193, n_layer=2, n_head=6, n_embd=72, n_kv_head=2, head_dim=24, intermediate_size=120, max_seq_len=512,
        norm="rmsnorm", positions="rope", activation="silu", gated_mlp=True, qkv_bias=False, out_bias=False, mlp_bias=False,
        tie_embeddings=False, family="llama",
    ),
}  # fmt: skip
# Between them: every way a family's step differs from the two above.
FAMILIES = ("llama-odd", "llama-dynamic", "mistral-odd", "mistral-window-1", "qwen2-window", "qwen3-window",
            "smollm3-window", "phi3-longrope", "phi3-partial", "olmo2-linear", "granite", "gemma2", "gemma3")  # fmt: skip
NAMES = (*RANDOM, *FAMILIES)
# The other precisions: a case's name, a slash, the arithmetic.
NARROW = tuple(f"{name}/{arithmetic}" for arithmetic in ("bfloat16", "int8") for name in (*RANDOM, *FAMILIES))
ALL = (*NAMES, *NARROW)
CHUNKS = (1, 7, 16, 64, 256)
COMPANY = [(name, chunk, threads) for name in RANDOM for chunk in CHUNKS for threads in (1, 2)] + [
    (name, chunk, threads) for name in (*FAMILIES, *NARROW) for chunk, threads in ((1, 2), (7, 1), (64, 2))
]
Rows = dict[int, np.ndarray]


@cache
def model(name: str) -> tuple[ModelConfig, Any]:
    """(config, weights)"""
    if name in RANDOM:
        weights = random_weights(RANDOM[name], seed=3)
        return RANDOM[name], {key: value * 8 if value.ndim == 2 else value for key, value in weights.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = make_checkpoint(name, Path(directory))
        weights = {key: np.array(value) for key, value in load_weights(path).items()}
        return ModelConfig.from_pretrained(path), weights


def make_engine(name: str, **options: Any) -> tuple[NanoServingEngine, RecordingExecutor]:
    case, _, arithmetic = name.partition("/")
    config, weights = model(case)
    if arithmetic:
        choice = {"bfloat16": ("bfloat16", None), "int8": ("auto", "int8")}[arithmetic]
        options["precision"] = choose_precision(*choice, "auto", "f32", config.dim_per_head)
    engine = NanoServingEngine(config, weights, **{"kv_cache_pages": 400, **options})
    return engine, record(engine)


def prompt_of(name: str, length: int, seed: int) -> list[int]:
    vocab_size = model(name.partition("/")[0])[0].vocab_size
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


@cache
def alone(name: str, length: int, seed: int) -> tuple[list[int], Rows]:
    """The reference: no company, no cache, whole prompt in one chunk, one thread."""
    engine, recorder = make_engine(name, max_chunk_size=512, enable_prefix_cache=False, num_threads=1)
    request = engine.generate([prompt_of(name, length, seed)], greedy(NUM_OUTPUT, ignore_eos=True))[0]
    return request.output_tokens, recorder.rows[request.req_id]


def assert_same_bits(expected: tuple[list[int], Rows], tokens: list[int], rows: Rows, what: str) -> None:
    assert tokens == expected[0], what
    assert rows.keys() == expected[1].keys(), what
    for position, row in rows.items():
        assert row.tobytes() == expected[1][position].tobytes(), f"{what}: bits differ at position {position}"


@pytest.mark.parametrize(("name", "chunk", "threads"), COMPANY)
def test_company_chunks_and_threads(name: str, chunk: int, threads: int) -> None:
    """32 requests of different lengths together, each against itself alone."""
    engine, recorder = make_engine(name, max_chunk_size=chunk, num_threads=threads, enable_prefix_cache=False)
    lengths = [1 + (37 * i) % 130 for i in range(32)]
    prompts = [prompt_of(name, length, i) for i, length in enumerate(lengths)]
    finished = engine.generate(prompts, greedy(NUM_OUTPUT, ignore_eos=True))
    for i, request in enumerate(finished):
        what = f"{name}, chunk {chunk}, {threads} threads, request {i}"
        assert_same_bits(
            alone(name, lengths[i], i), request.output_tokens, recorder.rows[request.req_id], what
        )


@pytest.mark.parametrize(
    ("name", "length"),
    [(name, length) for name in NAMES for length in (15, 16, 17, 64, 100, 128)]
    + [(name, length) for name in NARROW for length in (16, 100)],
)
def test_cache_miss_hit_and_full_hit(name: str, length: int) -> None:
    """The same prompt three times, and a longer one that shares its beginning."""
    engine, recorder = make_engine(name)
    prompt = prompt_of(name, length, 1)
    hits = []
    for _ in range(3):
        request = engine.generate([prompt], greedy(NUM_OUTPUT, ignore_eos=True))[0]
        hits.append(request.prefix_hit_len)
        assert_same_bits(
            alone(name, length, 1), request.output_tokens, recorder.rows[request.req_id], f"hit {hits[-1]}"
        )
        engine.audit()
    assert hits[0] == 0
    switches = (
        name.partition("/")[0] in CASES and CASES[name.partition("/")[0]].original is not None
    )  # its pages serve sequences of one kind only
    if length >= 16 and not switches:
        assert hits[1] == min(length - 1, length // 16 * 16)
    longer = prompt + prompt_of(name, 50, 2)
    engine_cold, recorder_cold = make_engine(name, enable_prefix_cache=False)
    cold = engine_cold.generate([longer], greedy(NUM_OUTPUT, ignore_eos=True))[0]
    warm = engine.generate([longer], greedy(NUM_OUTPUT, ignore_eos=True))[0]
    assert switches or warm.prefix_hit_len >= length // 16 * 16
    expected = (cold.output_tokens, recorder_cold.rows[cold.req_id])
    assert_same_bits(expected, warm.output_tokens, recorder.rows[warm.req_id], "partial hit")


@pytest.mark.parametrize(
    ("name", "prefix_cache"),
    [(name, cached) for name in NAMES for cached in (False, True)] + [(name, True) for name in NARROW],
)
def test_preemption(name: str, prefix_cache: bool) -> None:
    """A pool too small for everyone: requests lose their pages, start over, and give the same bits."""
    engine, recorder = make_engine(
        name, kv_cache_pages=12, max_chunk_size=16, enable_prefix_cache=prefix_cache
    )
    lengths = [40, 41, 55, 30, 62, 33, 47, 58]
    prompts = [prompt_of(name, length, i) for i, length in enumerate(lengths)]
    finished = engine.generate(prompts, greedy(40, ignore_eos=True))
    assert engine.get_stats()["preemptions"] > 0
    for i, request in enumerate(finished):
        roomy, roomy_recorder = make_engine(name, enable_prefix_cache=False)
        other = roomy.generate([prompts[i]], greedy(40, ignore_eos=True))[0]
        expected = (other.output_tokens, roomy_recorder.rows[other.req_id])
        assert_same_bits(
            expected, request.output_tokens, recorder.rows[request.req_id], f"{name}, request {i}"
        )
    engine.audit()


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule(data: st.DataObject) -> None:
    """Random company, chunk size, budget, pool, page size, policy, threads, cache: never a different bit."""
    name = data.draw(st.sampled_from(ALL))
    options = {
        "max_chunk_size": data.draw(st.sampled_from(CHUNKS)),
        "max_batch_size": data.draw(st.integers(1, 32)),
        "max_num_batched_tokens": data.draw(st.integers(32, 300)),
        "kv_cache_pages": data.draw(st.integers(12, 200)),
        "page_size": data.draw(st.sampled_from([16, 32])),
        "num_threads": data.draw(st.integers(1, 2)),
        "policy": data.draw(st.sampled_from(["fcfs", "sjf", "ljf", "priority", "lpm"])),
        "enable_prefix_cache": data.draw(st.booleans()),
    }
    engine, recorder = make_engine(name, **options)
    jobs = data.draw(st.lists(st.tuples(st.integers(1, 150), st.integers(0, 3)), min_size=1, max_size=8))
    finished = engine.generate([prompt_of(name, *job) for job in jobs], greedy(NUM_OUTPUT, ignore_eos=True))
    for job, request in zip(jobs, finished, strict=True):
        expected = alone(name, *job)
        assert_same_bits(
            expected, request.output_tokens, recorder.rows[request.req_id], f"{name} {options} {job}"
        )
    engine.audit()


def test_sampled_tokens_do_not_depend_on_company() -> None:
    """With a seed, temperature sampling draws the same tokens alone and among 31 others."""
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=20, seed=11, ignore_eos=True)
    prompts = [prompt_of("gpt2", 20 + i, i) for i in range(32)]
    engine, _ = make_engine("gpt2")
    together = [request.output_tokens for request in engine.generate(prompts, params)]
    for prompt, tokens in zip(prompts[:8], together, strict=False):
        single, _ = make_engine("gpt2", enable_prefix_cache=False, max_chunk_size=7)
        assert single.generate([prompt], params)[0].output_tokens == tokens


class BatchDependentExecutor(RecordingExecutor):
    """The mutant: rounds differently when a batch has company, as a kernel with a size-dependent reduction would."""

    def forward(self, batch: Batch) -> Logits:
        logits = self.inner.forward(batch)
        if batch.size > 1:
            return Logits.of(np.nextafter(logits.values, np.float32(np.inf)))
        return logits


def test_a_mutant_that_rounds_by_batch_size_is_caught() -> None:
    """One unit in the last place, only in company: the comparison above must see it."""
    engine, _ = make_engine("gpt2", enable_prefix_cache=False)
    mutant = BatchDependentExecutor(engine.executor)
    recorder = RecordingExecutor(mutant)
    engine.batcher.executor = recorder
    finished = engine.generate(
        [prompt_of("gpt2", 20, i) for i in range(2)], greedy(NUM_OUTPUT, ignore_eos=True)
    )
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(
            alone("gpt2", 20, 0), finished[0].output_tokens, recorder.rows[finished[0].req_id], "mutant"
        )

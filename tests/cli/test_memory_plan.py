"""plan_memory divides memory by rules that can be checked by hand, and refuses contradictions with the numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve import LLM, NanoServingEngine, SamplingParams, memory_plan
from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.executor import ModelExecutor
from nanoserve.kernels import attention
from nanoserve.memory_plan import MemoryPlan, plan_memory
from nanoserve.models.config import ModelConfig
from nanoserve.models.rope import Rope
from nanoserve.models.weights import random_weights
from nanoserve.native import StepExecutor

CONFIG = ModelConfig(vocab_size=256, n_layer=4, n_head=6, n_embd=192, max_seq_len=512)
WEIGHTS = 4 * 1_927_296
PER_TOKEN = 2 * 4 * 4 * 192  # K and V, float32, layers, width
PAGE = 16 * PER_TOKEN
# Rows of x, h, qkv, att, mlp and last, each rounded up to 64 and 16 more; 32 rows of logits and 256 of prompts.
ACTIVATIONS = 4 * (2048 * (4 * (192 + 16) + (576 + 16) + (768 + 16)) + (32 + 256) * 256)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is said of threads: whatever this machine has, sizes are those by hand."""
    monkeypatch.setattr(memory_plan, "default_num_threads", lambda: 1)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_available(num_bytes: int) -> None:
        monkeypatch.setattr(memory_plan, "available_memory", lambda: num_bytes)

    return set_available


def test_sizes_by_hand() -> None:
    plan = plan_memory(CONFIG, memory_bytes=WEIGHTS + ACTIVATIONS + 2**20 + 10 * PAGE, stored_bytes=123)
    assert (plan.num_parameters, plan.weight_bytes, plan.stored_bytes) == (1_927_296, WEIGHTS, 123)
    assert (plan.kv_bytes_per_token, plan.page_bytes) == (PER_TOKEN, PAGE)
    assert abs(plan.activation_bytes - ACTIVATIONS) < 2**16, "logits rows have a stride of their own"


def test_a_budget_is_used_to_the_last_page() -> None:
    fixed = plan_memory(CONFIG, kv_cache_bytes=PAGE)
    base = fixed.weight_bytes + fixed.activation_bytes
    plan = plan_memory(CONFIG, memory_bytes=base + 10 * PAGE)
    assert (plan.num_pages, plan.kv_cache_bytes, plan.num_tokens) == (10, 10 * PAGE, 160)
    assert plan.total_bytes == plan.memory_bytes
    assert plan_memory(CONFIG, memory_bytes=base + 11 * PAGE - 1).num_pages == 10
    assert plan.max_model_len == 160, "the pool is what limits a sequence"
    assert (plan.concurrency, plan.concurrency_at(17), plan.concurrency_at(16)) == (1, 5, 10)


def test_the_pool_never_gets_more_than_its_sequences_can_use() -> None:
    assert plan_memory(CONFIG, memory_bytes=2**36).num_pages == 32 * 32
    assert plan_memory(CONFIG, memory_bytes=2**36, max_num_seqs=3).num_pages == 3 * 32
    shorter = plan_memory(CONFIG, memory_bytes=2**36, max_num_seqs=3, max_model_len=100)
    assert (shorter.num_pages, shorter.max_model_len, shorter.concurrency) == (3 * 7, 100, 3)
    assert plan_memory(CONFIG, memory_bytes=2**36, page_size=48).num_pages == 32 * 11


def test_a_default_takes_a_quarter_of_what_is_available(available: Any) -> None:
    available(400 * PAGE)
    plan = plan_memory(CONFIG)
    assert (plan.num_pages, plan.memory_bytes) == (100, 400 * PAGE)
    available(403 * PAGE)
    assert plan_memory(CONFIG).num_pages == 100
    available(404 * PAGE)
    assert plan_memory(CONFIG).num_pages == 101


def test_a_small_machine_gives_what_is_left_when_that_is_less_than_a_quarter(available: Any) -> None:
    fixed = plan_memory(CONFIG, kv_cache_bytes=PAGE)
    available(fixed.weight_bytes + fixed.activation_bytes + 3 * PAGE)
    assert plan_memory(CONFIG).num_pages == 3


def test_a_sequence_that_was_asked_for_outweighs_the_quarter(available: Any) -> None:
    fixed = plan_memory(CONFIG, kv_cache_bytes=PAGE)
    machine = fixed.weight_bytes + fixed.activation_bytes + 32 * PAGE
    assert machine // 4 < 90 * PAGE
    config = dataclasses.replace(CONFIG, max_seq_len=4096)
    base = plan_memory(config, kv_cache_bytes=PAGE)
    available(base.weight_bytes + base.activation_bytes + 256 * PAGE)
    restrained, asked = plan_memory(config), plan_memory(config, max_model_len=4096)
    assert restrained.num_pages < 256
    assert (asked.num_pages, asked.max_model_len) == (256, 4096)


def test_the_machine_is_not_asked_when_the_pool_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda: pytest.fail("asked"))
    plan = plan_memory(CONFIG, kv_cache_bytes=5 * PAGE + 1)
    assert (plan.num_pages, plan.memory_bytes) == (5, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_bytes": 1000}, f"memory_bytes: 1000 is less than {WEIGHTS} of weights (1927296 parameters) + "),
        ({"memory_bytes": WEIGHTS}, f"memory_bytes: {WEIGHTS} is less than {WEIGHTS} of weights"),
        ({"memory_bytes": 30_000_000, "kv_cache_bytes": 10_000_000}, f"kv_cache_bytes: 10000000 + {WEIGHTS} of weights + "),
        ({"kv_cache_bytes": PAGE - 1}, f"kv_cache_bytes: {PAGE - 1} is less than one page of {PAGE} bytes"),
        ({"kv_cache_bytes": 2**62}, f"kv_cache_bytes: {2**62} is {2**62 // PAGE} pages of {PAGE} bytes, the pool's limit is "
                                    f"{(2**31 - 1) // 16}"),
        ({"max_model_len": 513}, "max_model_len: 513 must be in [1, the model's 512]"),
        ({"max_model_len": 100, "kv_cache_bytes": 6 * PAGE},
         f"max_model_len: 100 tokens need 7 KV pages of {PAGE} bytes ({7 * PAGE}), there is room for 6 ({6 * PAGE})"),
        ({"page_size": 24}, "page_size: 24 must be a multiple of 16"),
        ({"page_size": 0}, "page_size: 0 must be in [1, 65536]"),
        ({"max_num_seqs": 0}, "max_num_seqs: 0 must be in [1, 2147483647]"),
        ({"memory_bytes": 1.5}, "memory_bytes: 1.5 must be a whole number"),
        ({"kv_cache_bytes": True}, "kv_cache_bytes: True must be a whole number"),
        ({"max_model_len": "64"}, "max_model_len: '64' must be a whole number"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        plan_memory(CONFIG, **arguments)
    assert str(refused.value).startswith(message)


def test_weights_that_do_not_fit_the_machine_are_refused(available: Any) -> None:
    available(1_000_000)
    with pytest.raises(
        ValueError, match=r"memory_bytes: 1000000, available on this machine, is less than 7709184 of weights"
    ):
        plan_memory(CONFIG)


def test_slots_stay_int32_however_much_memory_there_is() -> None:
    small = ModelConfig(vocab_size=16, n_layer=1, n_head=1, n_embd=8, max_seq_len=2**20, positions="rope")
    plan = plan_memory(small, memory_bytes=2**50, max_num_seqs=2**20)
    assert plan.num_tokens <= 2**31 - 1 < plan.num_tokens + 16 * 16


def test_rotary_tables_count_once_per_kind_and_double_for_a_switch() -> None:
    plain = ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=32, max_seq_len=4096, positions="rope")
    table = 4 * 4096 * 16

    def activations(config: ModelConfig) -> int:
        return plan_memory(config, kv_cache_bytes=2**20).activation_bytes

    learned = activations(dataclasses.replace(plain, positions="learned"))
    assert activations(plain) - learned == table
    local = dataclasses.replace(
        plain, local_rope=Rope(16, 500.0), sliding_window=64, sliding_layers=(True, False)
    )
    assert activations(local) - learned == 2 * table
    long = Rope(
        16, kind="longrope", factor=4.0, original_len=1024, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8
    )
    assert long.switch_len == 1024
    assert activations(dataclasses.replace(plain, rope=long)) - learned == 2 * table


def parts(config: ModelConfig, threads: int, **arguments: Any) -> int:
    """What a plan counts for more threads than one."""
    plans = [plan_memory(config, kv_cache_bytes=2**23, num_threads=n, **arguments) for n in (threads, 1)]
    return plans[0].activation_bytes - plans[1].activation_bytes


def test_what_attention_leaves_is_counted_per_window_and_thread() -> None:
    plain = ModelConfig(vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=4096)
    mixed = dataclasses.replace(plain, sliding_window=600, sliding_layers=(True, False, True))

    small, large = attention.tilings(2, 2, 16)
    shape = ((small.rows, small.tiles), (large.rows, large.tiles), 2, 2, 16)
    most = StepExecutor.most_parts_bytes
    assert most(*shape, 2048, 4096, 1) == 0
    assert parts(plain, 8) == most(*shape, 2048, 4096, 8) > 0
    assert parts(plain, 8, max_num_batched_tokens=7, max_model_len=1000) == most(*shape, 7, 1000, 8)
    assert parts(mixed, 8) == most(*shape, 2048, 4096, 8) + most(*shape, 2048, 4096, 8, 600)
    assert most(*shape, 2048, 4096, 8, 600) < most(*shape, 2048, 4096, 8)


def test_a_model_is_loaded_by_the_plan_of_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def plan(*arguments: Any, **named: Any) -> MemoryPlan:
        planned.append(plan_memory(*arguments, **named))
        return planned[-1]

    monkeypatch.setattr("nanoserve.llm.plan_memory", plan)
    for threads in (1, 2):
        LLM(Path(__file__).parents[2] / "models" / "tiny-gpt", num_threads=threads, kv_cache_bytes=2**20)
    assert planned[0].activation_bytes < planned[1].activation_bytes


@pytest.mark.parametrize("window", [None, 700])
def test_no_step_takes_more_than_what_is_counted(window: int | None) -> None:
    """Prompts in chunks and answers together, of long and short sequences, shared by eight threads."""
    config = ModelConfig(
        vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, max_seq_len=4096, sliding_window=window
    )
    weights, generator = random_weights(config), np.random.default_rng(0)
    prompts = [generator.integers(0, 64, length).tolist() for length in (3900, 2500, 900, 40, 40, 3)]
    taken = {}
    for threads in (1, 8):
        engine = NanoServingEngine(
            config, weights, kv_cache_pages=600, num_threads=threads, max_num_batched_tokens=512
        )
        engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
        taken[threads] = engine.executor.parts_bytes
        assert taken[threads] <= parts(config, threads, max_num_batched_tokens=512)
    assert taken[1] == 0
    assert taken[8] > 2**17, "nothing was shared, so nothing was tested"


def test_the_plan_is_what_the_pool_and_the_executor_take() -> None:
    """Pages and weights against the real objects, not against the formula again."""
    config = ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=32, max_seq_len=128)
    plan = plan_memory(config, kv_cache_bytes=2**20)
    pool = KVCachePool(plan.num_pages, plan.page_size, config.n_layer, config.kv_heads, config.dim_per_head)
    assert pool.num_pages * pool.page_bytes == plan.kv_cache_bytes
    loaded: list[int] = []
    ModelExecutor(config, random_weights(config), pool, on_load=lambda done, total, name: loaded.append(done))
    assert loaded[-1] == plan.weight_bytes


@settings(max_examples=200)
@given(
    memory=st.integers(1, 2**34), kv=st.none() | st.integers(1, 2**34), length=st.none() | st.integers(1, 512),
    seqs=st.integers(1, 1000), page=st.sampled_from([16, 32, 64]),
)  # fmt: skip
def test_every_plan_keeps_its_promises(
    memory: int, kv: int | None, length: int | None, seqs: int, page: int
) -> None:
    arguments: dict[str, Any] = {"memory_bytes": memory, "kv_cache_bytes": kv, "max_model_len": length,
                                 "max_num_seqs": seqs, "page_size": page}  # fmt: skip
    try:
        plan: MemoryPlan = plan_memory(CONFIG, **arguments)
    except ValueError:
        return  # what is refused has its own test
    assert plan == plan_memory(CONFIG, **arguments)
    assert plan.num_pages >= 1
    assert plan.total_bytes <= memory
    assert plan.max_model_len <= min(CONFIG.max_seq_len, plan.num_tokens)
    assert plan.max_model_len == length or length is None
    assert plan.concurrency >= 1
    if kv is None:
        assert plan.num_pages <= seqs * -(-(length or CONFIG.max_seq_len) // page)
    else:
        assert kv - plan.page_bytes < plan.kv_cache_bytes <= kv

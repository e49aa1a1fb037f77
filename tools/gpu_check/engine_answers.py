"""Whether an engine of real shapes answers rightly, beside how fast it does: no transformers of that size is there to ask.

Kernels that small models do not reach (few rows of many outputs, heads of 128, vocabularies above 65,536) are these answers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tools.gpu_check.engine_work import random_tokens
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.tiny_models import GREEDY, answers, tokens_of

from nanoserve import Batch, ModelConfig, NanoServingEngine, PageTable, Request

_NEAR = 0.05  # of a row's norm, by which the logits of two arithmetics may differ


def prompts_of(config: ModelConfig, tiny: bool) -> list[list[int]]:
    count, length = (4, 17) if tiny else (32, 64)  # together more rows than are few
    return [random_tokens(config, length, 2000 + number) for number in range(count)]


def check_answers(gpu: Gpu, record: Record, name: str, engine: NanoServingEngine) -> None:
    """Of an engine that promises the same bits in any batch."""
    prompts = prompts_of(engine.config, gpu.tiny)
    by_host = replace(GREEDY, max_tokens=3 if gpu.tiny else 8)

    def ask(some: list[list[int]], params: Any) -> list[Any]:
        engine.radix_mgr.clear()
        return engine.generate(some, params)

    together, alone = answers(ask(prompts, by_host)), answers(ask(prompts[:1], by_host))
    record.check(f"{name}: alone and among {len(prompts)}, the same bits", alone == together[:1])
    chosen = tokens_of(ask(prompts, replace(by_host, logprobs=None)))
    differ = [number for number, found in enumerate(chosen) if found != together[number][0]]
    record.check(
        f"{name}: the tokens that the device chooses are the host's", not differ, f"answers {differ} differ" if differ else ""
    )  # fmt: skip
    tokens, logits = last_logits(engine, prompts)
    largest = logits.argmax(1).tolist()
    differ = [row for row, (token, at) in enumerate(zip(tokens, largest, strict=True)) if token != at]
    record.check(
        f"{name}: greedy tokens are those of the largest logits", not differ, f"rows {differ} differ" if differ else ""
    )  # fmt: skip


def last_logits(
    engine: NanoServingEngine, prompts: Sequence[list[int]]
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Greedy tokens and logits of a step of decoding: each prompt's last token, the others known."""
    requests = [Request(f"logits-{number}", prompt) for number, prompt in enumerate(prompts)]
    executor: Any = engine.executor
    engine.radix_mgr.clear()
    for request in requests:
        request.page_table = PageTable(engine.kv_pool)
        request.page_table.grow_to(request.total_len)
    try:
        executor.forward(Batch.from_prefill(requests))
        for request in requests:
            request.cached_len = request.total_len - 1
        started = executor.start(Batch([(request, 1) for request in requests]))
        return started.tokens(), np.array(started.logits(range(len(requests))).values)
    finally:
        for request in requests:
            if request.page_table is not None:
                request.page_table.release()


def check_near(record: Record, name: str, found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    """Whether logits by one arithmetic are another's, but for its rounding."""
    apart = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    worst = float(np.nan_to_num(apart, nan=np.inf).max())
    record.check(name, worst < _NEAR, f"{worst:.1e} of a row's norm apart, at most {_NEAR}")

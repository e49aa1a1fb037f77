"""Who asks for nothing pays for nothing: memory and calls of the sampler, counted, not timed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoserve import logits_processors, sampler
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams

VOCAB, ROWS = 60_000, 4
ROW_BYTES = 4 * VOCAB


def batch(**fields: Any) -> list[Request]:
    return [Request(i, [1, 2, 3], params=SamplingParams(seed=i, **fields)) for i in range(ROWS)]


LOGITS = np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)


def peak_bytes(work: Callable[[], Any]) -> int:
    work()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_greedy_batch_allocates_nothing_of_the_size_of_a_row() -> None:
    """One argmax over the executor's own array: no copy of the logits, of all rows or of one."""
    requests = batch(temperature=0.0)
    assert peak_bytes(lambda: Sampler().sample(LOGITS, requests, (2,))) < ROW_BYTES / 10


def test_greedy_rows_among_others_are_not_copied() -> None:
    """Three greedy rows and one that is drawn: the memory of one row's float64 weights and sums, no more."""
    requests = [*batch(temperature=0.0)[:3], batch()[3]]
    alone = peak_bytes(lambda: Sampler().sample(LOGITS[3:], requests[3:], (2,)))
    together = peak_bytes(lambda: Sampler().sample(LOGITS, requests, (2,)))
    assert together < alone + ROW_BYTES / 10
    assert alone < 2.5 * 2 * ROW_BYTES


def test_temperature_alone_never_copies_or_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows go from float32 logits to float64 weights in one place."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("this row asked for nothing")

    monkeypatch.setattr(sampler, "_draw_filtered", refuse)
    monkeypatch.setattr(logits_processors.LogitsProcessor, "apply", refuse)
    assert len(Sampler().sample(LOGITS, batch(temperature=0.7), (2,))) == ROWS
    with pytest.raises(AssertionError, match="asked for nothing"):
        Sampler().sample(LOGITS, batch(temperature=0.7, top_k=5), (2,))
    with pytest.raises(AssertionError, match="asked for nothing"):
        Sampler().sample(LOGITS, batch(temperature=0.7, logit_bias={1: 1.0}), (2,))


@pytest.mark.parametrize(
    ("fields", "has_one"),
    [
        ({}, False), ({"temperature": 0.0, "top_k": 5, "logprobs": 3}, False), ({"stop": ["x"], "seed": 1}, False),
        ({"repetition_penalty": 1.0, "presence_penalty": 0.0, "logit_bias": {}}, False), ({"min_tokens": 1}, True),
        ({"presence_penalty": 0.1}, True), ({"frequency_penalty": 0.1}, True), ({"repetition_penalty": 1.1}, True),
        ({"logit_bias": {1: 0.5}}, True),
    ],
    ids=str,
)  # fmt: skip
def test_only_requests_that_change_logits_have_a_processor(fields: dict[str, Any], has_one: bool) -> None:
    """One look at an attribute is all that the others cost in the sampler."""
    assert (Request(1, [1], params=SamplingParams(**fields)).logits_processor is not None) is has_one


def test_after_min_tokens_the_processor_has_nothing_to_do() -> None:
    """From then on the request is an ordinary one."""
    request = Request(1, [1], params=SamplingParams(min_tokens=2))
    assert request.logits_processor is not None
    work = []
    for token in range(4):
        work.append(request.logits_processor.has_work(request))
        request.append_output(token)
    assert work == [True, True, False, False]


def test_a_large_batch_is_drawn_in_parts() -> None:
    """Weights are float64: 64 rows at once would be 64 times the memory, and fall out of the caches."""
    rows = np.broadcast_to(LOGITS[0], (64, VOCAB))
    requests = [Request(i, [1], params=SamplingParams(seed=i)) for i in range(64)]
    assert peak_bytes(lambda: Sampler().sample(rows, requests, ())) < 3 * 8 * sampler._WORKING_SET

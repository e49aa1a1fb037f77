"""Who asks for nothing pays for nothing: memory and calls of the sampler, counted, not timed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoserve import logits_processors, sampler
from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams
from nanoserve.scheduling.scoring import score_tokens
from support.readers import compiled

VOCAB, ROWS = 60_000, 4
ROW_BYTES = 4 * VOCAB


def batch(**fields: Any) -> list[Request]:
    return [Request(i, [1, 2, 3], params=SamplingParams(seed=i, **fields)) for i in range(ROWS)]


LOGITS = compiled(np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32))


def peak_bytes(work: Callable[[], Any]) -> int:
    work()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"logprobs": 5}],
    ids=str,
)
def test_python_allocates_nothing_of_the_size_of_a_row(fields: dict[str, Any]) -> None:
    """One native call over the executor's own memory: no copy of the logits, no array over the vocabulary."""
    requests = batch(**fields)
    finite = [True] * ROWS

    def work() -> None:
        score_tokens(requests, LOGITS, Sampler().sample(LOGITS, requests, (2,)), finite, ())

    assert peak_bytes(work) < ROW_BYTES / 10


def test_only_the_row_that_is_changed_is_copied() -> None:
    """Its neighbours' logits are read where they lie."""
    requests = [*batch(top_p=0.9)[:3], *batch(logit_bias={1: 1.0})[3:]]
    assert ROW_BYTES < peak_bytes(lambda: Sampler().sample(LOGITS, requests, (2,))) < 1.2 * ROW_BYTES


def test_a_large_batch_is_copied_in_parts() -> None:
    """64 copies at once would be 64 times the memory, and fall out of the caches."""
    logits = Logits.of(np.broadcast_to(LOGITS.values[0], (64, VOCAB)))
    requests = [Request(i, [1], params=SamplingParams(seed=i, logit_bias={1: 1.0})) for i in range(64)]
    assert peak_bytes(lambda: Sampler().sample(logits, requests, ())) < 1.1 * 4 * sampler._WORKING_SET


def test_who_changes_nothing_never_meets_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at an attribute is all."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("this row asked for nothing")

    monkeypatch.setattr(logits_processors.LogitsProcessor, "apply", refuse)
    monkeypatch.setattr(Logits, "take", refuse)
    assert len(Sampler().sample(LOGITS, batch(temperature=0.7, top_k=5), (2,))) == ROWS
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

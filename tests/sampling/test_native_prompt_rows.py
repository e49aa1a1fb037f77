"""Prompt rows of the native step: more rows of logits than requests, each with the bits it has when it is the last."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoserve import ModelConfig, NanoServingEngine, random_weights
from nanoserve.logprobs import TokenLogprob, token_logprobs
from support.readers import compiled
from support.recording import greedy, record

CONFIG = ModelConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, max_seq_len=128)
WEIGHTS = {
    name: array * 8 if array.ndim == 2 else array for name, array in random_weights(CONFIG, seed=4).items()
}
PROMPT = [(7 * i * i + 3) % 300 for i in range(37)]


def entry_of(row: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    return token_logprobs(compiled(row[None]), [0], [token], [num_top])[0]


def engine(**options: Any) -> NanoServingEngine:
    return NanoServingEngine(CONFIG, WEIGHTS, num_threads=1, kv_cache_pages=32, **options)


@pytest.mark.parametrize("chunk_size", [5, 16, 256])
def test_a_prompt_row_has_the_bits_of_a_prompt_that_ends_there(chunk_size: int) -> None:
    """So prompt log-probabilities are those of the tokens as outputs would be, whatever the chunks and the batch."""
    short = engine(enable_prefix_cache=False)
    rows = record(short).rows
    short.generate([PROMPT[:length] for length in range(1, 37, 4)], greedy(1))
    last = {position: row for by_position in rows.values() for position, row in by_position.items()}
    assert len(last) == 9

    served = engine(max_chunk_size=chunk_size)
    recorder = record(served)
    silent = served.add_request(PROMPT[:20], greedy(6))
    asked = served.add_request(PROMPT, greedy(6, prompt_logprobs=2, logprobs=1))
    while served.has_unfinished:
        served.step()
        served.audit()
    logits = recorder.rows[asked.req_id]
    assert asked.prompt_logprobs is not None
    assert len(asked.prompt_logprobs) == len(PROMPT)
    for position, row in last.items():
        assert np.array_equal(logits[position], row)
        assert asked.prompt_logprobs[position + 1] == entry_of(row, PROMPT[position + 1], 2)
    for at, entry in enumerate(asked.logprobs):
        assert entry == entry_of(logits[len(PROMPT) - 1 + at], asked.output_tokens[at], 1)
        assert (entry.rank, entry.top[0][0]) == (1, asked.output_tokens[at])
    alone = engine().generate([PROMPT[:20], PROMPT], greedy(6))
    assert [silent.output_tokens, asked.output_tokens] == [request.output_tokens for request in alone]


def test_more_rows_than_the_batch_has_requests_fit_one_step() -> None:
    """Every row of a step may be wanted: as many rows of logits as the step has tokens."""
    served = engine(max_num_batched_tokens=64, max_chunk_size=64)
    requests = served.generate([PROMPT, PROMPT[:27]], greedy(1, prompt_logprobs=0))
    assert served.get_stats()["steps"] == 1
    assert [len(request.prompt_logprobs or ()) for request in requests] == [37, 27]
    assert requests[0].prompt_logprobs is not None
    assert requests[0].prompt_logprobs[:27] == requests[1].prompt_logprobs

"""Phase 0: batches. What one forward pass computes, and which of its rows are sampled."""

from __future__ import annotations

import numpy as np
import pytest

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool, PageTable
from nanoserve.request import Request


def decoding(req_id: str, prompt: list[int], outputs: list[int]) -> Request:
    """A request with everything computed but its last output token."""
    request = Request(req_id, prompt)
    for token in outputs:
        request.append_output(token)
    request.cached_len = request.total_len - 1
    return request


def test_a_prefill_batch_lays_whole_prompts_end_to_end() -> None:
    """Two prompts of 3 and 2 tokens are 5 rows; positions restart at 0; the last row of each is sampled."""
    batch = Batch.from_prefill([Request("a", [10, 11, 12]), Request("b", [20, 21])])
    assert (batch.size, batch.num_tokens, batch.is_prefill, batch.is_decode) == (2, 5, True, False)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.sample_rows.tolist() == [2, 4]
    assert {batch.input_ids.dtype, batch.positions.dtype, batch.sample_rows.dtype} == {np.dtype(np.int32)}


def test_a_decode_batch_has_one_row_per_request() -> None:
    """Each request feeds its newest token at its own position, and every row is sampled."""
    batch = Batch.from_decode([decoding("a", [1, 2, 3], [7]), decoding("b", [1], [4, 5])])
    assert (batch.is_decode, batch.is_prefill) == (True, False)
    assert batch.input_ids.tolist() == [7, 5]
    assert batch.positions.tolist() == [3, 2]
    assert batch.sample_rows.tolist() == [0, 1]


def test_decode_refuses_a_request_with_uncomputed_prompt() -> None:
    """Decoding past tokens without KV would attend to garbage."""
    with pytest.raises(ValueError, match="'a' cannot decode, 3 of its tokens are not computed"):
        Batch.from_decode([Request("a", [1, 2, 3])])


def test_a_cached_prefix_is_not_computed_again() -> None:
    """Rows begin at cached_len, with the positions they have in the whole prompt."""
    batch = Batch.from_prefill([Request("a", [10, 11, 12, 13], cached_len=3)])
    assert batch.input_ids.tolist() == [13]
    assert batch.positions.tolist() == [3]
    assert batch.is_prefill


def test_a_chunk_that_stops_short_is_not_sampled() -> None:
    """Only the piece that reaches the last known token has logits that mean anything."""
    long, short = Request("long", list(range(8))), Request("short", [50, 51])
    batch = Batch.from_chunks([(long, 5), (short, 2)])
    assert batch.sampled == [False, True]
    assert batch.sample_rows.tolist() == [6]
    assert batch.sampling_requests == [short]
    long.cached_len = 5
    last = Batch.from_chunks([(long, 3)])
    assert (last.input_ids.tolist(), last.positions.tolist(), last.sampled) == ([5, 6, 7], [5, 6, 7], [True])


def test_a_mixed_batch_puts_decode_rows_before_chunks() -> None:
    """What the engine runs: decode rows and prefill chunks in one forward."""
    batch = Batch.mixed([decoding("d", [1, 2], [3])], [(Request("p", [8, 9, 10]), 2)])
    assert batch.input_ids.tolist() == [3, 8, 9]
    assert batch.positions.tolist() == [2, 0, 1]
    assert batch.sample_rows.tolist() == [0]
    assert (batch.is_prefill, batch.is_decode) == (True, False)


@pytest.mark.parametrize("build", [Batch.from_prefill, Batch.from_decode, Batch.from_chunks, Batch])
def test_an_empty_batch_is_refused(build: object) -> None:
    """A step without work must be the scheduler's decision, not a forward of zero rows."""
    with pytest.raises(ValueError, match="no requests"):
        build([])  # type: ignore[operator]


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_a_piece_must_fit_what_is_left_to_compute(count: int) -> None:
    """A count taken before cached_len grew would run past the sequence: it is refused, not read out of bounds."""
    with pytest.raises(ValueError, match=f"'a' has 3 tokens to compute, asked for {count}"):
        Batch.from_chunks([(Request("a", [1, 2, 3]), count)])


def test_one_request_cannot_be_in_a_batch_twice() -> None:
    """Its two pieces would write the same KV slots."""
    request = Request("a", [1, 2, 3])
    with pytest.raises(ValueError, match="twice"):
        Batch.from_chunks([(request, 1), (request, 1)])


def test_out_loc_names_the_slot_each_row_writes() -> None:
    """slot = page * page_size + offset, from each request's own table and start."""
    pool = KVCachePool(num_pages=8, page_size=4)
    first, second = Request("a", list(range(6))), Request("b", [1, 2], cached_len=1)
    for request in (first, second):
        request.page_table = PageTable(pool)
        request.page_table.grow_to(request.total_len)
    batch = Batch.from_prefill([first, second])
    assert batch.out_loc.tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert batch.out_loc.dtype == np.int32


def test_a_batch_needs_pages_before_it_can_write() -> None:
    """A request without a page table has nowhere to write its KV."""
    with pytest.raises(ValueError, match="'a' holds no pages"):
        _ = Batch.from_prefill([Request("a", [1])]).out_loc


def test_a_batch_is_a_snapshot() -> None:
    """Starts and counts stay as built while the request moves on, so commit can still tell what was computed."""
    request = Request("a", [1, 2, 3])
    batch = Batch.from_prefill([request])
    request.cached_len = 3
    request.append_output(9)
    assert (batch.starts, batch.counts, batch.positions.tolist()) == ([0], [3], [0, 1, 2])

"""Phase 3: cutting one prompt into chunks."""

from __future__ import annotations

import pytest

from nanoserve.request import Request
from nanoserve.scheduling.chunked_request import ChunkedRequest
from support.fakes import prompt


def chunks_of(length: int, chunk_size: int, cached_len: int = 0) -> ChunkedRequest:
    return ChunkedRequest(Request("a", prompt(length), cached_len=cached_len), chunk_size)


def sizes(chunks: ChunkedRequest) -> list[int]:
    found = []
    while chunks.has_more_chunks:
        found.append(len(chunks.get_next_chunk()))
    return found


def test_even_chunks() -> None:
    """512 tokens by 256 are two full chunks, and together they are the prompt."""
    chunks = chunks_of(512, 256)
    assert chunks.total_chunks == 2
    assert chunks.get_next_chunk() + chunks.get_next_chunk() == chunks.request.prompt_tokens
    assert not chunks.has_more_chunks


def test_uneven_chunks() -> None:
    """The last chunk is what is left: 10 tokens by 4 are 4, 4 and 2."""
    chunks = chunks_of(10, 4)
    assert (chunks.total_chunks, sizes(chunks)) == (3, [4, 4, 2])


@pytest.mark.parametrize(
    ("length", "chunk_size", "expected"), [(1, 256, [1]), (256, 256, [256]), (5, 1, [1] * 5)]
)
def test_chunks_at_the_edges(length: int, chunk_size: int, expected: list[int]) -> None:
    """A single token, exactly one chunk, chunks of one token."""
    assert sizes(chunks_of(length, chunk_size)) == expected


def test_peeking_consumes_nothing() -> None:
    """The size of the next chunk is known before it is taken, also of the last one and of none."""
    chunks = chunks_of(6, 4)
    assert [chunks.peek_next_chunk_size() for _ in range(3)] == [4, 4, 4]
    assert len(chunks.get_next_chunk()) == 4
    assert chunks.peek_next_chunk_size() == 2
    chunks.get_next_chunk()
    assert chunks.peek_next_chunk_size() == 0
    assert chunks.get_next_chunk() == []


def test_progress_runs_from_zero_to_one() -> None:
    """The share of tokens computed."""
    chunks = chunks_of(10, 4)
    seen = [chunks.progress]
    while chunks.has_more_chunks:
        chunks.get_next_chunk()
        seen.append(chunks.progress)
    assert seen == [0.0, 0.4, 0.8, 1.0]


def test_reset_goes_back_to_the_beginning() -> None:
    """The beginning is where it was made: a cached prefix stays cached."""
    chunks = chunks_of(10, 4, cached_len=3)
    first = chunks.get_next_chunk()
    chunks.reset()
    assert chunks.request.cached_len == 3
    assert chunks.get_next_chunk() == first


def test_a_cached_prefix_needs_no_chunks() -> None:
    """7 of 10 tokens to compute by 4: two chunks, from position 3."""
    chunks = chunks_of(10, 4, cached_len=3)
    assert (chunks.total_chunks, chunks.progress) == (2, 0.3)
    assert chunks.get_next_chunk() == chunks.request.prompt_tokens[3:7]


def test_a_recomputed_request_chunks_its_outputs_too() -> None:
    """After a preemption everything known is prompt."""
    request = Request("a", [1, 2, 3])
    request.append_output(4)
    request.append_output(5)
    chunks = ChunkedRequest(request, 2)
    assert [chunks.get_next_chunk() for _ in range(chunks.total_chunks)] == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize("chunk_size", [0, -4, 1.5, None])
def test_a_chunk_size_that_cannot_work_is_refused(chunk_size: object) -> None:
    """By name, with the value."""
    with pytest.raises(ValueError, match=f"chunk_size: {chunk_size!r}"):
        ChunkedRequest(Request("a", [1]), chunk_size)  # type: ignore[arg-type]

"""A prompt being computed piece by piece.

    [0 ... cached_len)            computed (or shared from the prefix cache)
          [cached_len ... end)    still to do, `chunk_size` tokens at a time; the last chunk may be shorter

It keeps no position of its own: `request.cached_len` is the position, so the two cannot disagree. After a preemption the
"prompt" is everything known, outputs included. A step with little budget left may take less than a chunk; then
`total_chunks`, the plan made at the beginning, is less than what it took.
"""

from __future__ import annotations

from nanoserve.checks import whole_number
from nanoserve.request import Request


class ChunkedRequest:
    """Chunks of one request's known tokens.

    Args:
        request: with at least one token to compute.
        chunk_size: most tokens per chunk.
    """

    __slots__ = ("_end", "_first", "chunk_size", "request")

    def __init__(self, request: Request, chunk_size: int = 256) -> None:
        self.request = request
        self.chunk_size = whole_number("chunk_size", chunk_size, 1)
        self._first = request.cached_len
        self._end = request.total_len

    @property
    def total_chunks(self) -> int:
        """Full-sized chunks it takes from where it began, the last one perhaps shorter."""
        return -(-(self._end - self._first) // self.chunk_size)

    @property
    def has_more_chunks(self) -> bool:
        return self.request.cached_len < self._end

    @property
    def progress(self) -> float:
        """Share of the tokens that are computed, 0 to 1; a cached prefix counts as computed."""
        return self.request.cached_len / self._end

    def peek_next_chunk_size(self) -> int:
        """Tokens of the next chunk, 0 when there is none; changes nothing."""
        return min(self.chunk_size, self._end - self.request.cached_len)

    def get_next_chunk(self) -> list[int]:
        """The next chunk's token ids, which count as computed from here on; empty when there is none."""
        start = self.request.cached_len
        chunk = self.request.token_ids[start : start + self.peek_next_chunk_size()].tolist()
        self.request.cached_len += len(chunk)
        return chunk

    def reset(self) -> None:
        """Back to where it began."""
        self.request.cached_len = self._first

    def __repr__(self) -> str:
        return f"ChunkedRequest({self.request.req_id!r}, {self.request.cached_len} of {self._end} tokens)"

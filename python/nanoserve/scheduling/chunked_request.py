"""ChunkedRequest: a prompt cut into chunks.

    tokens   [0 ........ request.cached_len) [cached_len ..... position) [position ........ total_len)
              computed                        handed out, in flight       still to hand out

The cursor runs ahead of `cached_len` only while a step is in flight; `reset` takes it back, for instance when the step failed.
"""

from __future__ import annotations

from nanoserve.request import Request


class ChunkedRequest:
    """Hands out a request's tokens still to compute, at most `chunk_size` at a time.

    Raises:
        ValueError: chunk_size below 1.
    """

    __slots__ = ("_begin", "chunk_size", "position", "request")

    def __init__(self, request: Request, chunk_size: int = 256) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size: {chunk_size} must be at least 1")
        self.request = request
        self.chunk_size = chunk_size
        self.position = self._begin = request.cached_len

    @property
    def total_chunks(self) -> int:
        """Chunks from where it began, at full size."""
        return -(-(self.request.total_len - self._begin) // self.chunk_size)

    @property
    def has_more_chunks(self) -> bool:
        return self.position < self.request.total_len

    @property
    def progress(self) -> float:
        """Share of the tokens handed out, 0 to 1; what the prefix cache gave counts as done."""
        return self.position / self.request.total_len

    def peek_next_chunk_size(self, limit: int | None = None) -> int:
        """Tokens the next chunk would have, 0 when there is none."""
        size = min(self.chunk_size, self.request.total_len - self.position)
        return size if limit is None else min(size, limit)

    def get_next_chunk(self, limit: int | None = None) -> list[int]:
        """The next chunk's tokens, and move past them.

        Raises:
            IndexError: no tokens are left.
        """
        size = self.peek_next_chunk_size(limit)
        if size < 1:
            raise IndexError(f"request {self.request.req_id!r} has no more chunks")
        chunk = self.request.token_ids[self.position : self.position + size]
        self.position += size
        return chunk.tolist()

    def reset(self) -> None:
        """Back to what is computed."""
        self.position = self._begin = self.request.cached_len

"""One ragged forward pass: which tokens of which requests the model computes in this step.

A batch is a list of (request, number of tokens) pieces laid end to end:

    rows of the forward   [r0: 1 decode row][r1: 1 decode row][r2: 64 prompt tokens][r3: 7 prompt tokens]
    positions             [r0.cached_len   ][r1.cached_len   ][r2.cached_len ...   ][r3.cached_len ... ]

Decode rows and prefill chunks differ only in their length; the kernels need no other distinction. A piece that reaches
its request's last known token yields a row of logits to sample from; a chunk that stops short of it yields none. Where
prompt log-probabilities were asked for, the rows of the prompt that lack them yield logits too. `sample_rows` are all of
these; `token_rows` says which of their logits are sampled from.

The batch is a snapshot: `starts` and `counts` are fixed when it is built and stay valid while requests move on.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoserve.request import Request

if TYPE_CHECKING:
    from nanoserve.native import PageTable

Int32Array = NDArray[np.int32]


class Batch:
    """Pieces of requests computed together.

    Args:
        pieces: (request, number of its next tokens), each 1 <= n <= request.extend_len.

    Raises:
        ValueError: no pieces, the same request twice, or a count outside its request's `extend_len`.
    """

    def __init__(self, pieces: Sequence[tuple[Request, int]]) -> None:
        if not pieces:
            raise ValueError("batch: no requests, at least one is needed")
        self.requests: list[Request] = []
        self.counts: list[int] = []
        self.starts: list[int] = []
        self.sampled: list[bool] = []  # per request: does its piece reach the last known token
        self.sources: Int32Array | None = None  # of a batch made by `ahead`
        self.prompt_rows: dict[int, range] = {}  # request's index: prompt positions it gets logits of, if any
        self._decode_only = True
        ids = array("i")
        rows: list[int] = []
        for request, count in pieces:
            left = request.extend_len
            if not 1 <= count <= left:
                raise ValueError(
                    f"batch: request {request.req_id!r} has {left} tokens to compute, asked for {count}"
                )
            start = request.cached_len
            if count != 1 or start < request.num_prompt_tokens:
                self._decode_only = False
                if request.lacks_prompt_logprobs:
                    positions = request.prompt_logprob_rows(start, count)
                    if positions:
                        self.prompt_rows[len(self.requests)] = positions
                        rows.extend(len(ids) + position - start for position in positions)
            self.requests.append(request)
            self.counts.append(count)
            self.starts.append(start)
            if count == 1:
                ids.append(request.token_ids[start])
            else:
                ids.extend(request.token_ids[start : start + count])
            self.sampled.append(count == left)
            if count == left:
                rows.append(len(ids) - 1)
        if len({id(request) for request in self.requests}) != len(self.requests):
            raise ValueError("batch: the same request twice")
        self.input_ids: Int32Array = np.frombuffer(ids, dtype=np.int32)
        self.sample_rows: Int32Array = np.array(rows, dtype=np.int32)

    @classmethod
    def from_prefill(cls, requests: Sequence[Request]) -> Batch:
        """Each request's whole remaining prompt."""
        return cls([(request, request.extend_len) for request in requests])

    @classmethod
    def from_decode(cls, requests: Sequence[Request]) -> Batch:
        """One token for each request; all but its last known token must be computed already."""
        for request in requests:
            if request.extend_len != 1:
                raise ValueError(
                    f"batch: request {request.req_id!r} cannot decode, {request.extend_len} of its tokens are not computed"
                )
        return cls([(request, 1) for request in requests])

    @classmethod
    def from_chunks(cls, chunks: Sequence[tuple[Request, int]]) -> Batch:
        """A part of each request's remaining prompt."""
        return cls(chunks)

    @classmethod
    def mixed(cls, decode: Sequence[Request], chunks: Sequence[tuple[Request, int]]) -> Batch:
        """What the engine runs: decode rows first, then prefill chunks, one forward."""
        return cls([(request, 1) for request in decode] + list(chunks))

    @classmethod
    def ahead(cls, before: Batch, rows: Sequence[int]) -> Batch:
        """The step after `before`, all of whose requests decode, for some of them, while their tokens are not known.

        `sources` are those rows: who computes takes the ids from there, `input_ids` are zeros.
        """
        batch = cls.__new__(cls)
        batch.requests = [before.requests[row] for row in rows]
        batch.starts = [before.starts[row] + 1 for row in rows]
        batch.counts, batch.sampled = [1] * len(rows), [True] * len(rows)
        batch.prompt_rows, batch._decode_only = {}, True
        batch.input_ids = np.zeros(len(rows), np.int32)
        batch.sample_rows = np.arange(len(rows), dtype=np.int32)
        batch.sources = np.array(rows, np.int32)
        return batch

    @property
    def size(self) -> int:
        """Requests in the batch."""
        return len(self.requests)

    @property
    def num_sampled(self) -> int:
        """Requests that get a token."""
        return len(self.sample_rows) if self.token_rows is None else len(self.token_rows)

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return len(self.input_ids)

    @property
    def tokens_by_request(self) -> dict[int | str, int]:
        """Tokens each request computes."""
        return {request.req_id: count for request, count in zip(self.requests, self.counts, strict=True)}

    @property
    def is_decode(self) -> bool:
        """Every piece is one output token."""
        return self._decode_only

    @property
    def is_prefill(self) -> bool:
        """At least one piece computes prompt tokens, so the batch is not decode only."""
        return not self.is_decode

    @property
    def sampling_requests(self) -> list[Request]:
        """The requests that get a token, in row order."""
        return [request for request, sampled in zip(self.requests, self.sampled, strict=True) if sampled]

    @cached_property
    def token_rows(self) -> NDArray[np.intp] | None:
        """The rows of the logits that `sampling_requests` are sampled from, in their order; None for all rows."""
        if not self.prompt_rows:
            return None
        chosen, row = [], 0
        for index, sampled in enumerate(self.sampled):
            row += len(self.prompt_rows.get(index, ()))
            if sampled:
                chosen.append(row)
                row += 1
        return np.array(chosen, dtype=np.intp)

    @property
    def tables(self) -> list[PageTable]:
        """The requests' page tables, in batch order."""
        tables = []
        for request in self.requests:
            if request.page_table is None:
                raise ValueError(f"batch: request {request.req_id!r} holds no pages yet")
            tables.append(request.page_table)
        return tables

    @cached_property
    def positions(self) -> Int32Array:
        """int32[num_tokens]: each row's position in its request."""
        pieces = zip(self.starts, self.counts, strict=True)
        return np.concatenate([np.arange(start, start + count, dtype=np.int32) for start, count in pieces])

    @cached_property
    def out_loc(self) -> Int32Array:
        """int32[num_tokens]: the KV slot each row writes, page_id * page_size + offset."""
        pieces = zip(self.tables, self.starts, self.counts, strict=True)
        return np.concatenate([table.slots(start, count) for table, start, count in pieces])

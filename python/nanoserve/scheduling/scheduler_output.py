"""One step's decision: what to compute, where its KV goes, which rows to sample. All a model of your own needs.

Arrays are built when first asked for: the engine's executor reads the batch and never pays for them. Ask before
`Scheduler.update`, after which the requests have moved on and some have given their pages back.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch, Int32Array
from nanoserve.observe.events import ReqId
from nanoserve.request import Request


class SchedulerOutput:
    """A batch and its paging. S requests, T tokens, L rows of logits, R of them to sample from.

    Attributes:
        step: number of the step, from 1.
        batch: the ragged batch: decode rows first, then prompt chunks.
        num_decode_rows: its leading requests that decode.
        preempted: ids of the requests that lost their pages in this step.
        new_tokens: filled by `Scheduler.update`: the token each request got.
    """

    def __init__(self, step: int, batch: Batch, num_decode_rows: int, preempted: tuple[ReqId, ...]) -> None:
        self.step = step
        self.batch = batch
        self.num_decode_rows = num_decode_rows
        self.preempted = preempted
        self.new_tokens: dict[ReqId, int] = {}

    @property
    def requests(self) -> list[Request]:
        """The S scheduled requests, in batch order."""
        return self.batch.requests

    @property
    def sampling_requests(self) -> list[Request]:
        """The R requests that need a token, in the order `update` expects them."""
        return self.batch.sampling_requests

    @cached_property
    def num_scheduled_tokens(self) -> dict[ReqId, int]:
        """Tokens of each request in this step."""
        return self.batch.tokens_by_request

    @property
    def input_ids(self) -> Int32Array:
        """int32[T]."""
        return self.batch.input_ids

    @property
    def positions(self) -> Int32Array:
        """int32[T]: position of each token in its sequence."""
        return self.batch.positions

    @property
    def slot_mapping(self) -> Int32Array:
        """int32[T]: the KV slot each token writes."""
        return self.batch.out_loc

    @property
    def sample_rows(self) -> Int32Array:
        """int32[L]: the rows of T whose logits are wanted."""
        return self.batch.sample_rows

    @property
    def token_rows(self) -> NDArray[np.intp] | None:
        """intp[R]: the rows of L that `sampling_requests` are sampled from; None if it is all of them.

        The others tell of prompt tokens whose log-probabilities were asked for.
        """
        return self.batch.token_rows

    @cached_property
    def starts(self) -> Int32Array:
        """int32[S]: tokens of each sequence that are in its pages already."""
        return np.array(self.batch.starts, dtype=np.int32)

    @cached_property
    def counts(self) -> Int32Array:
        """int32[S]: new tokens of each sequence."""
        return np.array(self.batch.counts, dtype=np.int32)

    @cached_property
    def block_tables(self) -> Int32Array:
        """int32[S, most pages]: page ids of each sequence in token order, the rest of a row zero."""
        pages = [table.pages for table in self.batch.tables]
        tables = np.zeros((len(pages), max(map(len, pages))), dtype=np.int32)
        for row, held in zip(tables, pages, strict=True):
            row[: len(held)] = held
        return tables

    def __repr__(self) -> str:
        return f"SchedulerOutput(step={self.step}, {self.num_scheduled_tokens}, preempted={self.preempted})"

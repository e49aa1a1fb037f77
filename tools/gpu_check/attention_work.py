"""Attention over pages on the device: decoding of sequences of any lengths, rows of a prompt, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tools.gpu_check.device_rows import Rows, apart, copies, random_rows, tensor_of
from tools.gpu_check.gpu import Gpu

from nanoserve.kernels.cuda.paged_attention import SEGMENT, TABLE_TOKENS, AttentionForm


class PagedKeys:
    """Keys and values of sequences, their pages in any order, as often as no cache holds them.

    Attributes:
        k, v, table: on the device. offsets: of each copy, where the tables of its sequences begin.
        order: the pages of the first copy's sequences.
    """

    def __init__(self, gpu: Gpu, form: AttentionForm, lengths: Sequence[int]) -> None:
        self.gpu, self.form, self.lengths = gpu, form, list(lengths)
        per_page = form.kv_heads * form.page_size * form.head_dim
        self.bytes = 2 * 2 * sum(lengths) * form.kv_heads * form.head_dim
        self.count = copies(self.bytes, gpu.tiny)
        pages = [-(-length // form.page_size) for length in lengths]
        total = self.count * sum(pages)
        self.k, self.v = random_rows(gpu, total, per_page), random_rows(gpu, total, per_page)
        free = np.random.default_rng(0).permutation(total).astype(np.int32)
        table: list[np.ndarray[Any, Any]] = []
        self.offsets: list[list[int]] = []
        at = 0
        for _ in range(self.count):
            self.offsets.append([])
            for length, count in zip(lengths, pages, strict=True):
                mine, free = free[:count], free[count:]
                entries = (-(-length // TABLE_TOKENS) + 1) * TABLE_TOKENS // form.page_size
                self.offsets[-1].append(at)
                at += entries
                table.append(np.concatenate([mine, np.repeat(mine[-1:], entries - count)]))
        self.order = [mine[:count] for mine, count in zip(table, pages, strict=False)]
        self.table = gpu.memory(np.concatenate(table))

    def expected(self, sequence: int, q: Any, start: int) -> Any:
        """Of rows of queries at positions from `start` on, in float32: [rows][heads * head_dim]."""
        import torch

        form = self.form
        pages = torch.from_numpy(self.order[sequence].astype(np.int64))

        def rows_of(held: Rows) -> Any:
            found = tensor_of(self.gpu, held)[pages.to(q.device)].float()
            found = found.reshape(-1, form.kv_heads, form.page_size, form.head_dim).permute(1, 0, 2, 3)
            return found.reshape(form.kv_heads, -1, form.head_dim)[:, : self.lengths[sequence]]

        k, v = rows_of(self.k), rows_of(self.v)
        q = q[:, : form.heads * form.head_dim]
        q = (q.bfloat16() if form.narrow else q).float().reshape(-1, form.kv_heads, form.group, form.head_dim)
        scores = torch.einsum("tkgd,knd->tkgn", q, k) * form.scale
        if form.softcap:
            scores = torch.tanh(scores / form.softcap) * form.softcap
        last = start + torch.arange(len(q), device=q.device)
        beyond = torch.arange(k.shape[1], device=q.device)[None] > last[:, None]
        scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
        return torch.einsum("tkgn,knd->tkgd", scores.softmax(-1), v).reshape(len(q), -1)


class Decoding:
    """A row of each sequence at its end: segments of keys, and their merging."""

    def __init__(self, gpu: Gpu, form: AttentionForm, lengths: Sequence[int]) -> None:
        self.gpu, self.form, self.keys = gpu, form, PagedKeys(gpu, form, lengths)
        batch, segments = len(lengths), [-(-length // SEGMENT) for length in lengths]
        self._num_pieces = sum(segments)
        self.q, self.out = (
            random_rows(gpu, batch, form.ld_q, dtype="f32"),
            random_rows(gpu, batch, form.ld_out),
        )
        many = self._num_pieces * form.heads
        self._parts = random_rows(gpu, many, form.head_dim, dtype="f32")
        self._sums = random_rows(gpu, many, 2, dtype="f32")
        firsts = np.cumsum([0, *segments[:-1]])
        self._decodes = gpu.memory(np.column_stack([np.arange(batch), lengths, firsts]).astype(np.int32))
        self._pieces = [
            gpu.memory(
                np.array(
                    [(row, segment, lengths[row] - 1, offset) for row, offset in enumerate(mine) for segment in range(segments[row])],
                    np.int32,
                )
            )
            for mine in self.keys.offsets
        ]  # fmt: skip

    def put(self, i: int) -> None:
        keys, mine, count = self.keys, self._pieces[i % self.keys.count], self._num_pieces
        self.gpu.put(
            self.form.split_spec(),
            [self.q, keys.k, keys.v, keys.table, mine, self._parts, self._sums, count, 0, 0],
        )
        self.gpu.put(
            self.form.merge_spec(),
            [self._parts, self._sums, self._decodes, self.out, len(keys.lengths), 0, 0],
        )

    def seconds(self) -> float:
        return self.gpu.seconds(self.put, max(self.keys.count, 2))

    def error(self) -> float:
        """At worst, of all sequences."""
        self.put(0)
        q, out = tensor_of(self.gpu, self.q), tensor_of(self.gpu, self.out)
        columns = self.form.heads * self.form.head_dim
        return max(
            apart(out[row : row + 1, :columns], self.keys.expected(row, q[row : row + 1], length - 1))
            for row, length in enumerate(self.keys.lengths)
        )


class Attending:
    """The last `rows` rows of one sequence: a prompt, or a chunk of one."""

    def __init__(self, gpu: Gpu, form: AttentionForm, rows: int, length: int) -> None:
        self.gpu, self.form, self.keys = gpu, form, PagedKeys(gpu, form, [length])
        self._start = length - rows
        self.q, self.out = random_rows(gpu, rows, form.ld_q, dtype="f32"), random_rows(gpu, rows, form.ld_out)
        tile = form.chunk_rows
        self._num_spans = -(-rows // tile)
        self._spans = [
            gpu.memory(
                np.array([(at, min(tile, rows - at), self._start + at, offset) for at in range(0, rows, tile)], np.int32)
            )
            for (offset,) in self.keys.offsets
        ]  # fmt: skip

    def put(self, i: int) -> None:
        keys, mine = self.keys, self._spans[i % self.keys.count]
        self.gpu.put(
            self.form.attend_spec(),
            [self.q, keys.k, keys.v, keys.table, mine, self.out, self._num_spans, 0, 0],
        )

    def seconds(self) -> float:
        return self.gpu.seconds(self.put, max(self.keys.count, 2))

    def error(self) -> float:
        self.put(0)
        out = tensor_of(self.gpu, self.out)[:, : self.form.heads * self.form.head_dim]
        return apart(out, self.keys.expected(0, tensor_of(self.gpu, self.q), self._start))

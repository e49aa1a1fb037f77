"""Attention over pages as a problem with operands and an answer, for the emulator and for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gpu.run_kernel import launch as emulated
from nanoserve.kernels.cuda import paged_attention
from nanoserve.kernels.cuda.paged_attention import TABLE_TOKENS, AttentionForm

PAGE = 16
SCRATCH = (np.zeros(1, np.int8), np.zeros(1, np.int8))


def narrowed(x: np.ndarray) -> np.ndarray:
    """bfloat16's bits."""
    return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()


def widened(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).view(torch.bfloat16).float().numpy()


@dataclass
class AttentionProblem:
    """Sequences of some lengths whose last rows attend; whatever no row may look at is NaN."""

    form: AttentionForm
    lengths: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        form, rng = self.form, np.random.default_rng(self.seed)
        pages = [-(-length // PAGE) for length in self.lengths]
        shape = (sum(pages) + 3, form.kv_heads, PAGE, form.head_dim)
        self.k, self.v = (np.full(shape, np.nan, np.float32) for _ in range(2))
        free = rng.permutation(shape[0])
        self.table_off, table = [], []
        self.keys, self.values = [], []
        for length, count in zip(self.lengths, pages, strict=True):
            mine, free = free[:count], free[count:]
            for store, kept in ((self.k, self.keys), (self.v, self.values)):
                rows = rng.standard_normal((length, form.kv_heads, form.head_dim), np.float32)
                if form.dtype == "bf16":
                    rows = widened(narrowed(rows))
                kept.append(rows)
                for at in range(length):
                    store[mine[at // PAGE], :, at % PAGE] = rows[at]
            self.table_off.append(len(table))
            padded = -(-length // TABLE_TOKENS) * TABLE_TOKENS // PAGE + TABLE_TOKENS // PAGE
            table += [*mine.tolist(), *[int(mine[-1])] * (padded - count)]
        self.table = np.array(table, np.int32)
        # Rows of all positions of all sequences: row first[s] + p is position p of sequence s.
        self.first = np.cumsum([0, *self.lengths])[:-1]
        self.q = rng.standard_normal((sum(self.lengths), form.ld_q), np.float32)

    def stored(self, cache: np.ndarray) -> np.ndarray:
        return narrowed(cache) if self.form.dtype == "bf16" else cache

    def spans(self, counts: tuple[int, ...], rows: int) -> np.ndarray:
        """The last `counts` rows of each sequence, in tiles, and one of padding."""
        made = []
        for first, length, count, table_off in zip(
            self.first, self.lengths, counts, self.table_off, strict=True
        ):
            for start in range(length - count, length, rows):
                made.append((first + start, min(rows, length - start), start, table_off))
        return np.array([*made, (0, 0, 0, 0)], np.int32)

    def empty(self) -> np.ndarray:
        dtype = np.float32 if self.form.out == "f32" else np.uint16
        return np.full((len(self.q), self.form.ld_out), 0x7FC0 if dtype == np.uint16 else np.nan, dtype)

    def attend(
        self, counts: tuple[int, ...], order: int = 0, launch: Callable[..., None] = emulated
    ) -> np.ndarray:
        form, out = self.form, self.empty()
        spans = self.spans(counts, form.chunk_rows)
        launch(
            form.attend_spec(), self.q, self.stored(self.k), self.stored(self.v), self.table, spans, out,
            len(spans), *SCRATCH, order=order,
        )  # fmt: skip
        return out

    def split(self, order: int = 0, launch: Callable[..., None] = emulated) -> np.ndarray:
        """The last row of each sequence."""
        form, out = self.form, self.empty()
        decodes, pieces = self.pieces()
        parts = np.full((len(pieces), form.heads, form.head_dim), np.nan, np.float32)
        sums = np.full((len(pieces), form.heads, 2), np.nan, np.float32)
        launch(
            form.split_spec(), self.q, self.stored(self.k), self.stored(self.v), self.table, pieces, parts, sums, len(pieces),
            *SCRATCH, order=order,
        )  # fmt: skip
        launch(form.merge_spec(), parts, sums, decodes, out, len(decodes), *SCRATCH, order=order)
        return out

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Decodes and pieces for the last row of each sequence, and padding of both."""
        decodes, pieces = [], []
        for row, length, table_off in zip(self.last, self.lengths, self.table_off, strict=True):
            decodes.append((row, length, len(pieces)))
            for segment in range(-(-length // paged_attention.SEGMENT)):
                pieces.append((row, segment, length - 1, table_off))
        padding = [(0, -1, 0, 0)] * 3
        return np.array([*decodes, (0, 0, 0)], np.int32), np.array([*pieces, *padding], np.int32)

    def rows(self, counts: tuple[int, ...]) -> list[int]:
        return [
            int(first) + at
            for first, length, count in zip(self.first, self.lengths, counts, strict=True)
            for at in range(length - count, length)
        ]

    @property
    def last(self) -> list[int]:
        return self.rows((1,) * len(self.lengths))

    def reference(self, counts: tuple[int, ...]) -> np.ndarray:
        """In float64."""
        form, made = self.form, []
        for sequence, (first, length, count) in enumerate(zip(self.first, self.lengths, counts, strict=True)):
            for at in range(length - count, length):
                q = self.q[first + at, : form.heads * form.head_dim]
                if form.narrow:
                    q = widened(narrowed(q))
                q = q.reshape(form.kv_heads, form.group, form.head_dim).astype(np.float64)
                oldest = max(0, at + 1 - form.window) if form.window else 0
                k, v = (x[sequence][oldest : at + 1].astype(np.float64) for x in (self.keys, self.values))
                scores = np.einsum("hgd,nhd->hgn", q, k) * form.scale
                if form.softcap:
                    scores = form.softcap * np.tanh(scores / form.softcap)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                made.append(np.einsum("hgn,nhd->hgd", weights, v).reshape(-1))
        return np.stack(made)


def numbers(form: AttentionForm, rows: np.ndarray) -> np.ndarray:
    rows = rows if form.out == "f32" else widened(rows)
    return rows[:, : form.heads * form.head_dim]


@cache
def form_of(kv_heads: int, group: int, dim: int, **fields: object) -> AttentionForm:
    heads = kv_heads * group
    ld_q, ld_out = -(-(heads + 2 * kv_heads) * dim // 8) * 8, -(-heads * dim // 8) * 8
    return AttentionForm(heads, kv_heads, dim, PAGE, ld_q, ld_out, scale=dim**-0.5, **fields)  # type: ignore[arg-type]


NARROW = {"dtype": "bf16", "narrow": True, "out": "bf16"}
FORMS = {
    "bf16": form_of(2, 4, 64, **NARROW),
    "bf16, one head each, odd size": form_of(1, 1, 80, **NARROW),
    "bf16, wide group": form_of(1, 24, 16, **NARROW),
    "bf16, window and cap": form_of(1, 3, 128, window=100, softcap=20.0, **NARROW),
    "bf16, wide heads": form_of(1, 2, 256, **NARROW),
    "f32": form_of(2, 2, 64),
    "f32, wide heads": form_of(1, 2, 128),
    "f32 of bf16 pages, window": form_of(1, 3, 48, dtype="bf16", window=70),
}

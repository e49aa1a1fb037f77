"""Attention over pages, as Triton compiles it, in the emulator: right, and the same bits whoever computes a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from tests.gpu.run_kernel import ORDERS, artifact, launch

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
class Problem:
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

    def attend(self, counts: tuple[int, ...], order: int = 0) -> np.ndarray:
        form, out = self.form, self.empty()
        spans = self.spans(counts, form.chunk_rows)
        launch(
            form.attend_spec(), self.q, self.stored(self.k), self.stored(self.v), self.table, spans, out, form.ld_q, form.ld_out,
            len(spans), *SCRATCH, order=order,
        )  # fmt: skip
        return out

    def split(self, order: int = 0) -> np.ndarray:
        """The last row of each sequence."""
        form, out = self.form, self.empty()
        spans = self.spans((1,) * len(self.lengths), 1)
        segments = -(-max(self.lengths) // paged_attention.SEGMENT) + 1  # one more than anybody needs
        parts = np.full((len(spans), form.heads, segments, form.head_dim), np.nan, np.float32)
        sums = np.full((len(spans), form.heads, segments, 2), np.nan, np.float32)
        launch(
            form.split_spec(), self.q, self.stored(self.k), self.stored(self.v), self.table, spans, parts, sums, form.ld_q,
            segments, len(spans), *SCRATCH, order=order,
        )  # fmt: skip
        launch(
            form.merge_spec(),
            parts,
            sums,
            spans,
            out,
            form.ld_out,
            segments,
            len(spans),
            *SCRATCH,
            order=order,
        )
        return out

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
LENGTHS = (1, 37, 300, 1100)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_what_they_should_be_and_have_the_same_bits_however_computed(name: str) -> None:
    form = FORMS[name]
    problem = Problem(form, LENGTHS)
    counts = (1, 20, form.chunk_rows + 3, 2)
    chunked = problem.attend(counts, order=2)
    tolerance = 1.5e-2 if form.narrow else 3e-6
    assert np.abs(numbers(form, chunked[problem.rows(counts)]) - problem.reference(counts)).max() < tolerance
    untouched = sorted(set(range(len(chunked))) - set(problem.rows(counts)))
    assert np.isnan(numbers(form, chunked[untouched])).all()
    alone = problem.attend((1,) * len(LENGTHS))
    split = problem.split()
    for other in (alone, split):
        assert numbers(form, other[problem.last]).tobytes() == numbers(form, chunked[problem.last]).tobytes()


@pytest.mark.parametrize("name", ["bf16", "f32"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_nothing(name: str, order: int) -> None:
    problem = Problem(FORMS[name], (5, 130), seed=order)
    assert problem.split(order).tobytes() == problem.split().tobytes()
    assert problem.attend((5, 30), order).tobytes() == problem.attend((5, 30)).tobytes()


@pytest.mark.parametrize("name", FORMS)
def test_what_is_compiled_fits_and_uses_tensor_cores(name: str) -> None:
    form = FORMS[name]
    for spec in (form.attend_spec(), form.split_spec(), form.merge_spec()):
        made = artifact(spec, "sm_90a")
        assert made.usage.spilled_bytes == 0
        has_products = "mma.sync" in made.ptx
        assert has_products == (form.narrow and dict(spec.params)["part"] != "merge")
        assert "fma" not in made.ptx or "fma.rn.f32" in made.ptx


def test_what_does_not_fit_is_refused() -> None:
    for fields, words in (
        ({"kv_heads": 3}, "multiple of kv_heads=3"),
        ({"page_size": 48}, "must divide 64"),
        ({"dtype": "f16"}, "'f16'"),
        ({"narrow": True}, "narrow"),
        ({"window": -1}, "window=-1"),
        ({"ld_out": 8}, "ld_out=8"),
    ):
        with pytest.raises(ValueError, match=words):
            AttentionForm(
                **{
                    "heads": 4,
                    "kv_heads": 2,
                    "head_dim": 16,
                    "page_size": 16,
                    "ld_q": 128,
                    "ld_out": 64,
                    **fields,
                }
            )  # type: ignore[arg-type]

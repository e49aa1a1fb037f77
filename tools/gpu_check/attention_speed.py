"""A model's attention by itself: whether it is right, by PyTorch in float32, then decoding, chunks and prompts by the clock."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from tools.gpu_check.attention_work import Attending, Decoding
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import attention_flops

from nanoserve.kernels.cuda.paged_attention import AttentionForm

BATCHES, CONTEXTS = (1, 4, 16, 64), (4096, 8192, 32768)
PROMPTS = (512, 2048, 8192)
MIXED = ((1, 32768), (63, 512))  # a long sequence among short ones: (how many, of what length)
CHUNK = (50, 32768)  # rows of a prompt's end, and what is before them
_NEAR = 3e-2  # bfloat16 weights and results, with room


def measure(gpu: Gpu, record: Record, model: str, form: AttentionForm, ceilings: Ceilings | None) -> None:
    with record.attempt(f"attention of {model} against PyTorch's"):
        _check(gpu, record, model, form)
    for batch, context in ((2, 600),) if gpu.tiny else product(BATCHES, CONTEXTS):
        name = f"decode attention of {model}, {batch} x {context}"
        if record.has_time(name, 1):
            with record.attempt(name):
                work = Decoding(gpu, form, [context] * batch)
                row = _of_bandwidth(work.seconds(), work.keys.bytes, ceilings)
                record.row("decode attention", model=model, batch=batch, context=context, **row)
    mixed = ((1, 600), (1, 20)) if gpu.tiny else MIXED
    shown = " + ".join(f"{count} x {length}" for count, length in mixed)
    if record.has_time(f"decode attention of {model}, {shown}", 1):
        with record.attempt(f"decode attention of {model}, {shown}"):
            work = Decoding(gpu, form, [length for count, length in mixed for _ in range(count)])
            row = _of_bandwidth(work.seconds(), work.keys.bytes, ceilings)
            record.row("decode attention, mixed", model=model, lengths=shown, **row)
    rows, start = (5, 64) if gpu.tiny else CHUNK
    if record.has_time(f"attention of {model}, {rows} rows after {start}", 1):
        with record.attempt(f"attention of {model}, {rows} rows after {start}"):
            chunk = Attending(gpu, form, rows, start + rows)
            row = _of_bandwidth(chunk.seconds(), chunk.keys.bytes, ceilings)
            record.row("chunk attention", model=model, rows=rows, start=start, **row)
    for tokens in (70,) if gpu.tiny else PROMPTS:
        name = f"prefill attention of {model}, {tokens}"
        if record.has_time(name, 1):
            with record.attempt(name):
                record.row("prefill attention", **_prefill(form, model, tokens, "ours", Attending(gpu, form, tokens, tokens).seconds(), ceilings))  # fmt: skip


def measure_torch(
    gpu: Gpu, record: Record, model: str, form: AttentionForm, ceilings: Ceilings | None
) -> None:
    """A prompt by PyTorch's own."""
    torch = gpu.torch
    attend = torch.nn.functional.scaled_dot_product_attention
    for tokens in PROMPTS:
        if record.has_time(f"prefill attention of {model}, {tokens} by torch", 1):
            shapes = (
                (1, heads, tokens, form.head_dim) for heads in (form.heads, form.kv_heads, form.kv_heads)
            )
            q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
            seconds = gpu.torch_seconds(
                lambda i, q=q, k=k, v=v: attend(q, k, v, is_causal=True, enable_gqa=True), 4
            )
            record.row("prefill attention", **_prefill(form, model, tokens, "torch", seconds, ceilings))


def _check(gpu: Gpu, record: Record, model: str, form: AttentionForm) -> None:
    """Sequences of one segment and of several; rows that fill no tile, after others."""
    works: Iterable[tuple[str, Any]] = (
        ("decoding", Decoding(gpu, form, (600, 20) if gpu.tiny else (1, 512, 1100, 4097))),
        ("a chunk", Attending(gpu, form, *((5, 70) if gpu.tiny else (150, 1250)))),
    )
    for name, work in works:
        error = work.error()
        record.check(
            f"attention of {model}, {name}: PyTorch's, nearly", error < _NEAR, f"error {error:.1e}, at most {_NEAR:.0e}"
        )  # fmt: skip


def _of_bandwidth(seconds: float, size: int, ceilings: Ceilings | None) -> dict[str, Any]:
    row: dict[str, Any] = {"bytes": size, "us": seconds * 1e6}
    if ceilings is not None:
        row["of_bandwidth"] = size / seconds / ceilings.bandwidth
    return row


def _prefill(
    form: AttentionForm, model: str, tokens: int, by: str, seconds: float, ceilings: Ceilings | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "tokens": tokens, "by": by, "us": seconds * 1e6}
    if ceilings is not None:
        flops = attention_flops(form.heads, form.head_dim, tokens)
        row["of_products"] = flops / seconds / ceilings.products
    return row

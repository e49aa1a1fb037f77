"""The products and the attention of real shapes by themselves: their part of the ceilings, and PyTorch's beside it.

Weights, keys and values are more than the cache holds: launches take turns among copies. Times are medians of graphs of
several launches, so gaps between them count as they do in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.engines import Arithmetic, arithmetics
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import Product, attention_flops, attention_form, models, products

from nanoserve import ModelConfig
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import TMA_SHAPE, GemmPlan, gemm_plan
from nanoserve.kernels.cuda.gemm_wgmma import gemm_wgmma_spec
from nanoserve.kernels.cuda.paged_attention import SEGMENT, TABLE_TOKENS, AttentionForm

ROWS = (1, 8, 32, 64, 128, 256, 512, 2048)
_MOST_HEAD_ROWS = 256  # a step has few rows of logits
BATCHES, CONTEXTS = (1, 4, 16, 64), (4096, 8192, 32768)
PROMPTS = (512, 2048, 8192)
_BEYOND_CACHE = 3 * 64 * 2**20  # bytes


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    for config in models(tiny).values():
        for made, _ in products(config).values():
            for one in arithmetics(chip, ours=True).values():
                yield from plan_of(made, chip, one).specs
            if chip.wgmma:
                yield copied_by_threads(made)
        form = attention_form(config, chip)
        yield from (form.attend_spec(), form.split_spec(), form.merge_spec())


def plan_of(made: Product, chip: Chip, one: Arithmetic) -> GemmPlan:
    """The kernels that an executor takes."""
    op = made.op
    return gemm_plan(
        op.n_in, op.n_out, made.ldx, made.ldy, chip, x="bf16", dtype="bf16", y=made.y, bias=op.bias is not None,
        activation=op.activation, residual=op.residual, scale=op.scale, softcap=op.softcap, gated=op.gated, **(one.plan or {}),
    )  # fmt: skip


def copied_by_threads(made: Product) -> GpuKernelSpec:
    """What Hopper's plan would have for many rows if its tiles came by cp.async: to see whether the copy engine pays."""
    op = made.op
    epilogue = Epilogue(op.bias is not None, op.activation, op.residual, op.scale, op.softcap, op.gated)
    return gemm_wgmma_spec(op.n_in, op.n_out, made.ldx, made.ldy, TMA_SHAPE, epilogue, y=made.y)


def run(gpu: Gpu, record: Record) -> None:
    ceilings = Ceilings.of(gpu.results.get("ceilings"))
    if ceilings is None:
        record.skip("fractions of the ceilings", "they were not measured: times only")
    for name, config in models(gpu.tiny).items():
        if record.has_time(f"attention of {name}", 4):
            with record.attempt(f"attention of {name}"):
                _decode_attention(gpu, record, name, config, ceilings)
                _prefill_attention(gpu, record, name, config, ceilings)
    for name, config in models(gpu.tiny).items():
        for key, (made, _) in products(config).items():
            if record.has_time(f"{key} of {name}", 3):
                with record.attempt(f"{key} of {name}"):
                    _product(gpu, record, name, made, ceilings)


@dataclass(frozen=True, slots=True)
class Rows:
    """Numbers on the device, as long as this lives.

    Attributes:
        held: a tensor of PyTorch's where that has the device.
    """

    address: int
    num_bytes: int
    held: Any


def random_rows(gpu: Gpu, *shape: int, dtype: str = "bf16", scale: float = 1.0) -> Rows:
    """Normal numbers."""
    if gpu.torch is not None:
        torch = gpu.torch
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        made = torch.empty(*shape, device="cuda", dtype=kind).normal_(std=scale)
        torch.cuda.synchronize()
        return Rows(made.data_ptr(), made.nbytes, made)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(scale)
    held = gpu.memory(values if dtype == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16))
    return Rows(held.address, held.num_bytes, held)


def copies(size: int, tiny: bool) -> int:
    """Of something of so many bytes, so that the cache does not hold what is needed next."""
    return 2 if tiny else max(1, min(40, -(-_BEYOND_CACHE // size)))


def _product(gpu: Gpu, record: Record, model: str, made: Product, ceilings: Ceilings | None) -> None:
    op, count = made.op, copies(made.weight_bytes, gpu.tiny)
    rows = [m for m in ((1, 17, 70) if gpu.tiny else ROWS) if made.name != "head" or m <= _MOST_HEAD_ROWS]
    width = -(-op.n_in // 8) * 8
    w = random_rows(gpu, count, made.rows, width, scale=0.02)
    x, y = random_rows(gpu, rows[-1], made.ldx), random_rows(gpu, rows[-1], made.ldy, dtype=made.y)
    bias = [random_rows(gpu, made.rows, dtype="f32")] if op.bias else []
    launches = max(count, 2 if gpu.tiny else 4)

    def ours(spec: GpuKernelSpec, m: int) -> float:
        size = 2 * made.rows * width
        each = [Rows(w.address + size * i, size, w.held) for i in range(count)]
        return gpu.seconds(lambda i: gpu.put(spec, [x, each[i % count], *bias, y, m]), launches)

    def torchs(m: int) -> float:
        linear, left = gpu.torch.nn.functional.linear, x.held[:m, : op.n_in]
        return gpu.torch_seconds(lambda i: linear(left, w.held[i % count, :, : op.n_in]), launches)

    for m in rows:
        if not record.has_time(f"{made.name} of {model} from {m} rows on", 0.5):
            return
        found = {
            name: plan_of(made, gpu.chip, one).spec_for(m)
            for name, one in arithmetics(gpu.chip, ours=True).items()
        }
        if any(spec.kind == "gemm_tma" for spec in found.values()):
            found["wgmma, cp.async"] = copied_by_threads(made)
        times = {name: ours(spec, m) for name, spec in found.items()}
        if gpu.torch is not None:
            times["torch"] = torchs(m)
        for name, seconds in times.items():
            record.row(
                "products", model=model, product=made.name, k=op.n_in, n=made.rows, m=m, by=name,
                **_fractions(seconds, made.bytes(m), made.flops(m), ceilings),
            )  # fmt: skip


def _fractions(seconds: float, size: int, flops: int, ceilings: Ceilings | None) -> dict[str, float]:
    found = {"us": seconds * 1e6}
    if ceilings is not None:
        found["of_bandwidth"] = size / seconds / ceilings.bandwidth
        found["of_products"] = flops / seconds / ceilings.products
    return found


class PagedKeys:
    """Keys and values of sequences of one length, their pages in any order, as often as no cache holds them.

    Attributes:
        k, v, table: on the device. offsets: of each copy, where the tables of its sequences begin.
    """

    def __init__(self, gpu: Gpu, form: AttentionForm, batch: int, context: int) -> None:
        per_page = form.kv_heads * form.page_size * form.head_dim
        pages = -(-context // form.page_size)
        self.bytes = 2 * 2 * batch * context * form.kv_heads * form.head_dim
        self.count = copies(self.bytes, gpu.tiny)
        total = self.count * batch * pages
        self.k = random_rows(gpu, total, per_page)
        self.v = random_rows(gpu, total, per_page)
        order = np.random.default_rng(0).permutation(total).astype(np.int32).reshape(-1, pages)
        entries = (-(-context // TABLE_TOKENS) + 1) * TABLE_TOKENS // form.page_size
        table = np.repeat(order[:, -1:], entries, 1)
        table[:, :pages] = order
        self.table = gpu.memory(table)
        self.offsets = (np.arange(self.count * batch) * entries).reshape(self.count, batch)


def _decode_attention(
    gpu: Gpu, record: Record, model: str, config: ModelConfig, ceilings: Ceilings | None
) -> None:
    form = attention_form(config, gpu.chip)
    cases: Iterator[tuple[int, int]] = product((2,), (600,)) if gpu.tiny else product(BATCHES, CONTEXTS)
    for batch, context in cases:
        if not record.has_time(f"decode attention of {model}, {batch} x {context}", 1):
            return
        keys = PagedKeys(gpu, form, batch, context)
        seconds = _decode_seconds(gpu, form, keys, batch, context)
        row: dict[str, Any] = {"model": model, "batch": batch, "context": context, "us": seconds * 1e6}
        if ceilings is not None:
            row["of_bandwidth"] = keys.bytes / seconds / ceilings.bandwidth
        record.row("decode attention", **row)


def _decode_seconds(gpu: Gpu, form: AttentionForm, keys: PagedKeys, batch: int, context: int) -> float:
    segments = -(-context // SEGMENT)
    q, out = random_rows(gpu, batch, form.ld_q, dtype="f32"), random_rows(gpu, batch, form.ld_out)
    parts = random_rows(gpu, batch * form.heads * segments, form.head_dim, dtype="f32")
    sums = random_rows(gpu, batch * form.heads * segments, 2, dtype="f32")
    spans = [
        gpu.memory(np.array([(row, 1, context - 1, offset) for row, offset in enumerate(mine)], np.int32))
        for mine in keys.offsets
    ]
    split, merge = form.split_spec(), form.merge_spec()

    def work(i: int) -> None:
        mine = spans[i % keys.count]
        gpu.put(split, [q, keys.k, keys.v, keys.table, mine, parts, sums, segments, batch, 0, 0])
        gpu.put(merge, [parts, sums, mine, out, segments, batch, 0, 0])

    return gpu.seconds(work, max(keys.count, 2))


def _prefill_attention(
    gpu: Gpu, record: Record, model: str, config: ModelConfig, ceilings: Ceilings | None
) -> None:
    form = attention_form(config, gpu.chip)
    for tokens in (70,) if gpu.tiny else PROMPTS:
        if not record.has_time(f"prefill attention of {model}, {tokens}", 1):
            return
        times = {"ours": _prefill_seconds(gpu, form, tokens)}
        if gpu.torch is not None:
            times["torch"] = _torch_attention(gpu, form, tokens)
        flops = attention_flops(form.heads, form.head_dim, tokens)
        for name, seconds in times.items():
            row: dict[str, Any] = {"model": model, "tokens": tokens, "by": name, "us": seconds * 1e6}
            if ceilings is not None:
                row["of_products"] = flops / seconds / ceilings.products
            record.row("prefill attention", **row)


def _prefill_seconds(gpu: Gpu, form: AttentionForm, tokens: int) -> float:
    keys = PagedKeys(gpu, form, 1, tokens)
    q, out = random_rows(gpu, tokens, form.ld_q, dtype="f32"), random_rows(gpu, tokens, form.ld_out)
    starts = range(0, tokens, form.chunk_rows)
    spans = [
        gpu.memory(np.array([(at, min(form.chunk_rows, tokens - at), at, offset) for at in starts], np.int32))
        for (offset,) in keys.offsets
    ]
    attend, count = form.attend_spec(), len(starts)
    return gpu.seconds(
        lambda i: gpu.put(
            attend,
            [q, keys.k, keys.v, keys.table, spans[i % keys.count], out, count, 0, 0],
        ),
        max(keys.count, 2),
    )


def _torch_attention(gpu: Gpu, form: AttentionForm, tokens: int) -> float:
    torch = gpu.torch
    q = torch.randn(1, form.heads, tokens, form.head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(1, form.kv_heads, tokens, form.head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    return gpu.torch_seconds(lambda i: attend(q, k, v, is_causal=True, enable_gqa=True), 4)

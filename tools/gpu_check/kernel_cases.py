"""A case or more for each kind of kernel: its launches with random operands, and what must come out.

`CASES` maps a kind, a file of kernels/cuda/, to its cases: a new kind is a new entry. A case is run for some numbers of rows
and gives its outputs, poisoned with NaN before; row i of every output is a function of row i of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tools.gpu_check.engines import ARITHMETICS, arithmetics

from gpu.attention_problem import FORMS, AttentionProblem, numbers
from gpu.matrix_problem import MatrixProblem
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda import library
from nanoserve.kernels.cuda.activation import activation_spec, convert_spec
from nanoserve.kernels.cuda.choose import choose_spec
from nanoserve.kernels.cuda.embedding import embedding_spec
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import TMA_SHAPE, GemmPlan, gemm_plan
from nanoserve.kernels.cuda.gemm_tma import gemm_tma_spec
from nanoserve.kernels.cuda.gemm_wgmma import gemm_wgmma_spec
from nanoserve.kernels.cuda.kv_write import kv_write_spec
from nanoserve.kernels.cuda.layout import row_stride, weight_stride
from nanoserve.kernels.cuda.logits import block_max_spec
from nanoserve.kernels.cuda.norm import norm_spec
from nanoserve.kernels.logits import num_blocks
from nanoserve.models.rope import Rope
from nanoserve.native import LOGITS_BLOCK
from support.bfloat16 import from_bf16, to_bf16

Array = np.ndarray[Any, Any]
MOST_ROWS = 300


class Launch(Protocol):
    """Gpu.launch, or the emulator's: arrays are changed in place."""

    def __call__(self, spec: GpuKernelSpec, *args: Array | int, order: int = 0, chip: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel with operands.

    Attributes:
        specs: kernels it may launch.
        run: outputs for so many rows: numbers, widened to float32, or integers.
        expected: of MOST_ROWS rows, in float64, or exact.
        tolerance: of |out - expected| relative to 1 + |expected|; 0: the same bits.
        row_by_row: rows do not depend on their number.
    """

    name: str
    specs: tuple[GpuKernelSpec, ...]
    run: Callable[[Launch, int], Sequence[Array]]
    expected: Callable[[int], Sequence[Array]]
    tolerance: float
    row_by_row: bool = True


def kinds() -> list[str]:
    """All there are: files of kernels/cuda/ that build kernels."""
    files = sorted(Path(library.__file__).parent.glob("*.py"))
    found = [path.stem for path in files if library._is_kernel(path, path.read_bytes())]
    return [stem for stem in found if not stem.endswith("_triton")]


def _random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _poison(*shape: int, dtype: str = "f32") -> Array:
    if dtype == "bf16":
        return np.full(shape, 0x7FC1, np.uint16)
    return np.full(shape, np.nan, np.float32)


def _wide(array: Array) -> Array:
    return from_bf16(array) if array.dtype == np.uint16 else array


def _act(name: str | None, x: Array) -> Array:
    """In float64, by PyTorch."""
    import torch

    values = torch.from_numpy(x.astype(np.float64))
    functions: dict[str | None, Callable[[Any], Any]] = {
        None: lambda v: v,
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "gelu_erf": torch.nn.functional.gelu,
    }
    return np.asarray(functions[name](values))


# ---- products

_GEMM_OPTIONS: dict[str, dict[str, Any]] = {
    "bias, gelu and residual": {"bias": True, "activation": "gelu_erf", "residual": True},
    "gated": {"gated": True, "activation": "silu"},
    "cap": {"scale": 0.7, "softcap": 3.0},
}
# By kind: types of x and of the weight, and what asks for it in a plan.
GEMMS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "gemm_f32": (("f32", "f32", {}), ("f32", "bf16", {}), ("f32", "f16", {})),
    **{
        f"gemm_{name}": (("bf16", "bf16", one.plan),)
        for name, one in ARITHMETICS.items()
        if one.plan is not None
    },
}


@dataclass(frozen=True, slots=True)
class GemmCase:
    """A product's problem, its plan, and a name."""

    name: str
    problem: MatrixProblem
    plan: GemmPlan

    def outputs(self, launch: Launch, m: int) -> list[Array]:
        return [_wide(self.problem.run(self.plan.spec_for(m), m=m, launch=launch))]


def gemm_problem(x: str, dtype: str, options: dict[str, Any]) -> MatrixProblem:
    """Ragged in every direction; bfloat16 results of a gated one, as layers have it."""
    y = "bf16" if x == "bf16" and options.get("gated") else "f32"
    return MatrixProblem(MOST_ROWS, 328, 157, x=x, dtype=dtype, y=y, **options)


def gemm_cases(kind: str, chip: Chip) -> list[GemmCase]:
    """None where the chip has no such instructions."""
    name = kind.removeprefix("gemm_")
    if name in ARITHMETICS and name not in arithmetics(chip):
        return []
    made = []
    for x, dtype, asked in GEMMS[kind]:
        for name, options in _GEMM_OPTIONS.items():
            p = gemm_problem(x, dtype, options)
            plan = gemm_plan(p.k, p.n, p.ldx, p.ldy, chip, x=x, dtype=dtype, y=p.y_type, **options, **asked)
            made.append(GemmCase(f"{kind} {x} x {dtype}, {name}", p, plan))
    return made


def _gemm(kind: str) -> Callable[[Chip], Iterable[Case]]:
    def cases(chip: Chip) -> Iterable[Case]:
        for one in gemm_cases(kind, chip):
            tolerance = 1e-2 if one.problem.y_type == "bf16" else 2e-5
            yield Case(
                one.name, one.plan.specs, one.outputs, lambda m, one=one: [one.problem.expected()[:m]], tolerance
            )  # fmt: skip

    return cases


def _tma(chip: Chip) -> Iterable[Case]:
    """For every number of rows, though plans have it for many; whether its bits are gemm_wgmma's is an output, too."""
    if not chip.wgmma:
        return
    for name, options in _GEMM_OPTIONS.items():
        p = gemm_problem("bf16", "bf16", options)
        spec, other = (
            make(p.k, p.n, p.ldx, p.ldy, TMA_SHAPE, Epilogue(**options), y=p.y_type)
            for make in (gemm_tma_spec, gemm_wgmma_spec)
        )

        def run(
            launch: Launch,
            m: int,
            p: MatrixProblem = p,
            spec: GpuKernelSpec = spec,
            other: GpuKernelSpec = other,
        ) -> list[Array]:
            found, same = (p.run(each, m=m, launch=launch) for each in (spec, other))
            return [_wide(found), np.full(m, float(found.tobytes() == same.tobytes()))]

        def expected(m: int, p: MatrixProblem = p) -> list[Array]:
            return [p.expected()[:m], np.ones(m)]

        tolerance = 1e-2 if p.y_type == "bf16" else 2e-5
        yield Case(f"gemm_tma, {name}", (spec, other), run, expected, tolerance)


# ---- rows


def _norm(chip: Chip) -> Iterable[Case]:
    cols, eps = 1000, 1e-5
    ld, ldo = row_stride(cols) + 8, row_stride(cols)
    x, weight, bias = _random(1, MOST_ROWS, ld), _random(2, cols), _random(3, cols)
    rows = np.random.default_rng(4).integers(0, MOST_ROWS, MOST_ROWS).astype(np.int32)
    wide = x[:, :cols].astype(np.float64)
    for kind, gather, dtype in (
        ("rmsnorm", True, "bf16"),
        ("rmsnorm", False, "f32"),
        ("layernorm", False, "f32"),
    ):
        has_bias = kind == "layernorm"
        spec = norm_spec(kind, cols, ld, ldo, eps, bias=has_bias, gather=gather, dtype=dtype)

        def run(
            launch: Launch, m: int, spec: GpuKernelSpec = spec, dtype: str = dtype, gather: bool = gather,
            has_bias: bool = has_bias,
        ) -> list[Array]:  # fmt: skip
            out = _poison(m, ldo, dtype=dtype)
            launch(
                spec, x, *([rows[:m].copy()] if gather else []), weight, *([bias] if has_bias else []), out, m
            )
            return [_wide(out)[:, :cols]]

        def expected(m: int, kind: str = kind, gather: bool = gather) -> list[Array]:
            chosen = wide[rows[:m]] if gather else wide[:m]
            if kind == "layernorm":
                centred = chosen - chosen.mean(1, keepdims=True)
                return [centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * weight + bias]
            return [chosen / np.sqrt((chosen**2).mean(1, keepdims=True) + eps) * weight]

        yield Case(f"{kind} to {dtype}", (spec,), run, expected, 8e-3 if dtype == "bf16" else 3e-6)


def _embedding(chip: Chip) -> Iterable[Case]:
    cols, vocab, scale = 773, 50, 3.7
    ld = row_stride(cols)
    rng = np.random.default_rng(0)
    ids, positions = (rng.integers(0, vocab, MOST_ROWS).astype(np.int32) for _ in range(2))
    table = to_bf16(_random(1, vocab, weight_stride(cols, "bf16")))
    more = _random(2, vocab, weight_stride(cols, "f32"))
    spec = embedding_spec(cols, ld, positions=True, scale=scale, dtype="bf16")

    def run(launch: Launch, m: int) -> list[Array]:
        x = _poison(m, ld)
        launch(spec, ids[:m].copy(), positions[:m].copy(), table, more, x, m)
        return [x[:, :cols]]

    def expected(m: int) -> list[Array]:
        return [from_bf16(table)[ids[:m], :cols] * np.float32(scale) + more[positions[:m], :cols]]

    yield Case("embedding", (spec,), run, expected, 0)


def _activation(chip: Chip) -> Iterable[Case]:
    cols = 771
    ldx, ldo = row_stride(2 * cols), row_stride(cols)
    x = _random(1, MOST_ROWS, ldx) * 3
    for name, gated, dtype in (("silu", True, "bf16"), ("gelu_erf", False, "f32"), (None, False, "bf16")):
        scale, cap = (1.0, 0.0) if gated else (1.5, 2.5)  # a gate excludes them
        spec = (
            convert_spec(cols, ldx, ldo)
            if name is None
            else activation_spec(cols, ldx, ldo, activation=name, gated=gated, scale=scale, softcap=cap, dtype=dtype)
        )  # fmt: skip

        def run(launch: Launch, m: int, spec: GpuKernelSpec = spec, dtype: str = dtype) -> list[Array]:
            out = _poison(m, ldo, dtype=dtype)
            launch(spec, x, out, m)
            return [_wide(out)[:, :cols]]

        def expected(m: int, name: str | None = name, gated: bool = gated) -> list[Array]:
            if name is None:
                return [from_bf16(to_bf16(x[:m, :cols]))]
            value = _act(name, x[:m, :cols])
            return [value * x[:m, cols : 2 * cols] if gated else np.tanh(value * 1.5 / 2.5) * 2.5]

        tolerance = 0 if name is None else 8e-3 if dtype == "bf16" else 3e-6
        yield Case(name or "convert", (spec,), run, expected, tolerance)


def _logits(chip: Chip) -> Iterable[Case]:
    vocab = 3 * LOGITS_BLOCK + 70
    ld, blocks = row_stride(vocab), num_blocks(vocab)
    x = _random(1, MOST_ROWS, ld)
    x[:, vocab:] = 1e9
    spec = block_max_spec(vocab, ld)

    def run(launch: Launch, m: int) -> list[Array]:
        largest = _poison(m, blocks)
        launch(spec, x, largest, m)
        return [largest]

    yield Case("block_max", (spec,), run, lambda m: [_block_max(x[:m, :vocab])], 0)


def _block_max(x: Array) -> Array:
    m, vocab = x.shape
    padded = np.full((m, num_blocks(vocab) * LOGITS_BLOCK), -np.inf, np.float32)
    padded[:, :vocab] = x
    return padded.reshape(m, -1, LOGITS_BLOCK).max(-1)


def _choose(chip: Chip) -> Iterable[Case]:
    """Greedy rows, and others whose uniform numbers lie in the middle of a token's share: no rounding decides."""
    vocab = 3 * LOGITS_BLOCK + 70
    ld = row_stride(vocab)
    x = _random(1, MOST_ROWS, ld)
    x[:, vocab:] = 1e9
    x[2, [5, 300]] = 50  # a tie: the first of them
    weights = np.exp(x[:, :vocab].astype(np.float64))
    drawn = np.random.default_rng(2).integers(0, vocab, MOST_ROWS)
    ends = np.cumsum(weights, axis=1)
    rows = np.arange(MOST_ROWS)
    middle = (ends[rows, drawn] - weights[rows, drawn] / 2) / ends[:, -1]
    draws, draw_ints = np.zeros((MOST_ROWS, 4), np.float32), np.zeros((MOST_ROWS, 4), np.int32)
    draws[3:, :3] = 1, 1, 0
    draw_ints[:, 1] = (middle * 2.0**32).astype(np.uint32).view(np.int32)
    largest = _block_max(x[:, :vocab])
    spec = choose_spec(vocab, ld)

    def run(launch: Launch, m: int) -> list[Array]:
        tokens = np.full(m, -7, np.int32)
        launch(spec, x, largest, draws, draw_ints, tokens, m)
        return [tokens]

    def expected(m: int) -> list[Array]:
        return [np.where(rows < 3, x[:, :vocab].argmax(1), drawn)[:m].astype(np.int32)]

    yield Case("choose", (spec,), run, expected, 0)


def _kv_write(chip: Chip) -> Iterable[Case]:
    heads, kv, dim, page, rotary, eps = 6, 2, 80, 16, 80, 1e-6
    row, num_pages = (heads + 2 * kv) * dim, MOST_ROWS // page + 3
    ld = row_stride(row)
    rng = np.random.default_rng(0)
    before, table = _random(1, MOST_ROWS, ld), Rope(rotary).table(500)
    slots = rng.permutation(num_pages * page)[:MOST_ROWS].astype(np.int32)
    slots[1] = -1  # a row without a token
    positions = rng.integers(0, 500, MOST_ROWS).astype(np.int32)
    weights = [_random(2, dim), _random(3, dim)]
    for dtype in ("f32", "bf16"):
        spec = kv_write_spec(heads, kv, dim, page, ld, rotary, qk_norm="head", norm_eps=eps, dtype=dtype)

        def run(launch: Launch, m: int, spec: GpuKernelSpec = spec, dtype: str = dtype) -> list[Array]:
            qkv = before[:m].copy()
            k, v = (_poison(num_pages, kv, page, dim, dtype=dtype) for _ in range(2))
            launch(spec, qkv, table, positions[:m].copy(), *weights, k, v, slots[:m].copy(), m)
            written = [
                np.stack([_wide(cache)[slot // page, :, slot % page] if slot >= 0 else np.zeros((kv, dim), np.float32)
                          for slot in slots[:m]])
                for cache in (k, v)
            ]  # fmt: skip
            untouched = (
                int(np.isnan(_wide(k)).sum() // (kv * dim)) == num_pages * page - (slots[:m] >= 0).sum()
            )
            return [qkv[:, : heads * dim], *written, np.full(m, float(untouched))]

        def expected(m: int) -> list[Array]:
            parts = before[:m, :row].reshape(m, heads + 2 * kv, dim).astype(np.float64)
            q, k, v = parts[:, :heads], parts[:, heads : heads + kv], parts[:, heads + kv :]
            turned = []
            for x, weight in zip((q, k), weights, strict=True):
                x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
                angles = table[positions[:m], None].astype(np.float64)
                cos, sin = angles[..., : rotary // 2], angles[..., rotary // 2 :]
                a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
                turned.append(np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary:]], -1))
            has = (slots[:m] >= 0)[:, None, None]
            return [turned[0].reshape(m, -1), turned[1] * has, v * has, np.ones(m)]

        yield Case(f"kv_write {dtype}", (spec,), run, expected, 8e-3 if dtype == "bf16" else 5e-6)


# ---- attention

_LENGTHS = (1, 37, 300, 1100)


def attention_problems() -> Iterable[tuple[str, AttentionProblem]]:
    for name, form in FORMS.items():
        yield name, AttentionProblem(form, _LENGTHS)


def _attention(chip: Chip) -> Iterable[Case]:
    """The last rows of sequences of several lengths; `rows` is how many of the longest attend."""
    for name, problem in attention_problems():
        form = problem.form

        def counts(m: int) -> tuple[int, ...]:
            return (1, min(m, 37), min(m, 300), min(m, 70))

        def run(launch: Launch, m: int, problem: AttentionProblem = problem) -> list[Array]:
            out = problem.attend(counts(m), launch=launch)
            return [numbers(problem.form, out[problem.rows(counts(m))])]

        def expected(m: int, problem: AttentionProblem = problem) -> list[Array]:
            return [problem.reference(counts(m))]

        yield Case(
            f"attention {name}", (form.attend_spec(), form.split_spec(), form.merge_spec()), run, expected,
            1.5e-2 if form.narrow else 5e-6, row_by_row=False,
        )  # fmt: skip


CASES: dict[str, Callable[[Chip], Iterable[Case]]] = {
    "activation": _activation,
    "choose": _choose,
    "embedding": _embedding,
    **{kind: _gemm(kind) for kind in GEMMS},
    "gemm_tma": _tma,
    "kv_write": _kv_write,
    "logits": _logits,
    "norm": _norm,
    "paged_attention": _attention,
}

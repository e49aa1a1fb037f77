"""Measures the GEMMs against the machine and writes bench/results/kernels.json.

    python -m bench.kernels [--quick] [--rounds 5]

For every shape, number of rows and arithmetic: the time of one product whose weight comes from memory (the calls go round
more copies of it than the caches hold), as a fraction of two measured limits. `read` is the time the same threads need to
only read as many bytes, `dots` the time they need for as many multiply-adds on operands in L1; `limit` is against the longer of
both. The three run one after another in each round, through the native executor and its threads; reported are medians over
the rounds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.limits import Machine, median_of
from bench.run import RESULTS, commit, machine
from nanoserve.kernels import gemm, peak
from nanoserve.native import StepExecutor

COLD_BYTES = 96 << 20  # of weights in one round trip: three times the last cache
MIN_SECONDS = 0.004  # of one timing
ROWS = (1, 2, 4, 8, 9, 16, 17, 32, 64, 128, 512, 2048)
QUICK_ROWS = (1, 8, 16, 128)
ARITHMETICS = {
    "f32": ("f32", "f32"),
    "f32xbf16": ("f32", "bf16"),
    "bf16": ("bf16", "bf16"),
    "int8": ("u8", "i8"),
}
PEAK_OF = {"f32": "f32", "f32xbf16": "f32", "bf16": "bf16", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    k: int
    n: int
    gated: bool = False
    max_rows: int = max(ROWS)


SHAPES = (
    Shape("qkv", 1024, 4096),
    Shape("out", 2048, 1024),
    Shape("gate_up", 1024, 3072, gated=True),
    Shape("down", 3072, 1024),
    Shape("head", 1024, 151_936, max_rows=8),
    Shape("small qkv", 512, 1024, max_rows=512),
    Shape("small out", 512, 512, max_rows=512),
    Shape("small gate_up", 512, 1536, gated=True, max_rows=512),
    Shape("small down", 1536, 512, max_rows=512),
    Shape("small head", 512, 8192, max_rows=32),
)
QUICK_SHAPES = ("qkv", "out", "gate_up")


class Memory:
    """One block of 32-bit words that are fine as any type of weight: pairs of bfloat16 around 1, no NaN."""

    def __init__(self, num_bytes: int, huge_pages: bool = True) -> None:
        block = mmap.mmap(-1, num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)  # type: ignore[attr-defined]
        self.words = np.frombuffer(block, np.uint32)
        values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32).view(np.uint32)
        values = (values & 0xFFFF0000) | (np.roll(values, 7) >> 16)
        for at in range(0, self.words.size, values.size):
            self.words[at : at + values.size] = values[: self.words.size - at]

    @property
    def cold(self) -> np.ndarray:
        """As much of it as no cache holds."""
        return self.words[: COLD_BYTES // 4]

    def pieces(self, num_bytes: int, total: int) -> Iterator[np.ndarray]:
        """Runs of memory one behind the other, at least one, about `total` bytes of them."""
        words = -(-num_bytes // 4)
        for i in range(max(1, min(total, self.words.nbytes) // num_bytes)):
            yield self.words[i * words : (i + 1) * words]


def product(
    machine_: Machine, arithmetic: str, shape: Shape, rows: int, memory: Memory
) -> Callable[[], float]:
    """Seconds of one product, its weight not in any cache."""
    x_type, dtype = ARITHMETICS[arithmetic]
    ldx, ldy = StepExecutor.stride(shape.k), StepExecutor.stride(shape.n)
    spec = gemm.gemm_spec(
        shape.k, shape.n, ldx, ldy, x=x_type, dtype=dtype, gated=shape.gated,
        activation="silu" if shape.gated else None,
    )  # fmt: skip
    width, group = gemm.panel_width(shape.n), gemm.GROUP[dtype]
    panels = -(-shape.n // width)
    outputs = panels * width * (2 if shape.gated else 1)
    x = memory.words[: rows * ldx].copy()  # room for any type
    scales = np.full(max(rows, outputs), 1e-3, np.float32)  # activations stay where theirs is the usual path
    sums = np.zeros(outputs, np.int32)
    y = np.zeros((rows, ldy), np.float32)
    num_bytes = outputs * -(-shape.k // group) * group * gemm.WEIGHT_BYTES[dtype]
    calls = []
    for weight in memory.pieces(num_bytes, COLD_BYTES):
        quantised = dtype == "i8"
        calls.append([x, *([scales] if quantised else []), weight, *([scales, sums] if quantised else []), y])
    return machine_.plan(spec, calls, panels, gemm.ROW_BLOCK, rows)


def measure(
    machine_: Machine, arithmetic: str, shape: Shape, rows: int, memory: Memory, rounds: int
) -> dict[str, Any]:
    """One row of the results; nanoseconds, bytes and multiply-adds of the product itself, without padding."""
    works = {
        "product": product(machine_, arithmetic, shape, rows, memory),
        "read": machine_.read(memory.cold),
        "dots": machine_.dots(PEAK_OF[arithmetic]),
    }
    weights = shape.k * shape.n * (2 if shape.gated else 1)
    num_bytes = weights * gemm.WEIGHT_BYTES[ARITHMETICS[arithmetic][1]]
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(median_of(work, MIN_SECONDS))
    rounds_of = list(zip(taken["product"], taken["read"], taken["dots"], strict=True))
    return {
        "shape": shape.name, "k": shape.k, "n": shape.n, "gated": shape.gated, "arithmetic": arithmetic,
        "rows": rows, "threads": machine_.num_threads,
        "us": round(statistics.median(taken["product"]) * 1e6, 1),
        "gb_per_s": round(num_bytes / statistics.median(taken["product"]) / 1e9, 1),
        "read": round(statistics.median(r * num_bytes / p for p, r, _ in rounds_of), 3),
        "dots": round(statistics.median(d * rows * weights / p for p, _, d in rounds_of), 3),
        "limit": round(
            statistics.median(max(r * num_bytes, d * rows * weights) / p for p, r, d in rounds_of), 3
        ),
    }  # fmt: skip


def peaks(machine_: Machine, memory: dict[str, Memory], rounds: int) -> dict[str, float]:
    """GB/s with small and huge pages, and 10^9 multiply-adds per second."""
    works = {f"read_{pages}_pages": machine_.read(block.cold) for pages, block in memory.items()}
    works |= {f"dots_{name}": machine_.dots(name) for name in peak.ARITHMETICS}
    return {
        name: round(1e-9 / statistics.median(work() for _ in range(3 * rounds)), 1)
        for name, work in works.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rows, nothing written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", help="1 and all by default")
    options = parser.parse_args()
    shapes = [shape for shape in SHAPES if not options.quick or shape.name in QUICK_SHAPES]
    row_counts = QUICK_ROWS if options.quick else ROWS
    largest = max(shape.k * (-(-shape.n // 64) * 64) * 4 for shape in shapes)
    memory = {
        pages: Memory(max(COLD_BYTES, largest) if pages == "huge" else COLD_BYTES, pages == "huge")
        for pages in ("huge", "small")
    }
    results: dict[str, Any] = {
        "command": "python -m bench.kernels",
        "commit": commit(),
        "machine": machine(),
        "peaks": {},
        "products": [],
        "small_pages": [],
    }
    for num_threads in options.threads or sorted({1, len(os.sched_getaffinity(0))}):
        machine_ = Machine(num_threads, max(ROWS))
        results["peaks"][num_threads] = peaks(machine_, memory, options.rounds)
        print(f"{num_threads} threads:", results["peaks"][num_threads])
        for shape in shapes:
            for arithmetic in ARITHMETICS:
                for rows in (count for count in row_counts if count <= shape.max_rows):
                    row = measure(machine_, arithmetic, shape, rows, memory["huge"], options.rounds)
                    results["products"].append(row)
                    print(
                        row["shape"],
                        arithmetic,
                        rows,
                        {key: row[key] for key in ("us", "read", "dots", "limit")},
                    )
                if shape.name == "qkv":
                    results["small_pages"] += [
                        measure(machine_, arithmetic, shape, rows, memory["small"], options.rounds)
                        for rows in (1, 8)
                    ]
    if not options.quick:
        (RESULTS / "kernels.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

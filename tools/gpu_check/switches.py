"""One way to run a whole model in bfloat16 against another: what choosing costs, and what bits do.

Each of our own arithmetics gives a row the same bits, whatever else runs. A library's product need not: the fastest of all
against the default is the price of that. And kernels that wait for each other's end, against those that begin early.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.engine_answers import check_near, last_logits, prompts_of
from tools.gpu_check.engine_speed import engine_of, measure
from tools.gpu_check.engines import arithmetics, engine_specs
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import models
from tools.gpu_check.tiny_models import BF16

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec

BATCHES = (1, 32, 256)
IN_TURN = "each kernel after the one in front"


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    config = next(iter(models(tiny).values()))
    for one in arithmetics(chip).values():
        yield from engine_specs(
            config, chip, BF16, "bf16", max_model_len=256 if tiny else 4096, gemm=one.gemm
        )


def run(gpu: Gpu, record: Record) -> None:
    ceilings = Ceilings.of(gpu.results.get("ceilings"))
    name, config = next(iter(models(gpu.tiny).items()))
    default: np.ndarray[Any, Any] | None = None
    ways: dict[str, dict[str, Any]] = {way: {"gemm": one.gemm} for way, one in arithmetics(gpu.chip).items()}
    ours = {*arithmetics(gpu.chip, ours=True), IN_TURN}
    if gpu.device.starts_early:
        first, options = next(iter(ways.items()))
        ways = {first: options, IN_TURN: {**options, "start_early": False}, **ways}
    for way, options in ways.items():
        if record.has_time(way, 5):
            with record.attempt(way):
                engine = engine_of(gpu, config, **options)
                _, logits = last_logits(engine, prompts_of(config, gpu.tiny))
                if way in ours and default is None:
                    default = logits
                elif default is None:
                    record.skip(f"{way}: the default's logits", "there are none")
                elif way in ours:
                    record.check_bits(f"{way}: the default's logits, to the bit", logits, default)
                else:
                    check_near(record, f"{way}: the default's logits, nearly", logits, default)
                batches = (1,) if gpu.tiny else BATCHES
                measure(gpu, record, name, engine, ceilings, batches, products=way)
                del engine
            gc.collect()  # of a device's memory, too
    tables = record.data["tables"]
    for table, time in (("decode", "step_ms"), ("prefill", "ms")):
        rows = tables.get(table, [])
        for key in dict.fromkeys(row.get("sequences", row.get("tokens")) for row in rows):
            times = {
                row["products"]: row[time] for row in rows if row.get("sequences", row.get("tokens")) == key
            }
            fastest = min(times, key=times.__getitem__)
            usual = next(iter(times))
            record.fact(
                f"{table} {key}",
                {"fastest": fastest, "default_over_fastest": times[usual] / times[fastest]},
            )

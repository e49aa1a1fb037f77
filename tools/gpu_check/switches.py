"""One arithmetic of the bfloat16 products against another, through a whole model: what choosing costs, and what bits do.

Every one of ours gives a row the same bits whatever else runs. A library's product need not: the fastest of all against the
default is the price of that.
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
    for arithmetic, one in arithmetics(gpu.chip).items():
        if record.has_time(arithmetic, 5):
            with record.attempt(arithmetic):
                engine = engine_of(gpu, config, gemm=one.gemm)
                _, logits = last_logits(engine, prompts_of(config, gpu.tiny))
                if default is None:
                    default = logits
                else:
                    check_near(record, f"{arithmetic}: the default's logits, nearly", logits, default)
                batches = (1,) if gpu.tiny else BATCHES
                measure(gpu, record, name, engine, ceilings, batches, products=arithmetic)
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

"""Prints what an engine answers on the device that NANOSERVE_FAKE_CUDA_CAPABILITY names: a process knows one device only.

`python -m tests.gpu.chip_answers llama bfloat16 wgmma 48 in-turn`: a model of test_cuda_engine, a precision, what multiplies,
how many tokens of a prompt a step computes at most, and whether kernels wait for each other's end.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from tests.gpu.test_cuda_engine import BF16, F32, GREEDY, answers, configs, image_of

from nanoserve import NanoServingEngine
from nanoserve.batch import Batch
from nanoserve.cuda import backend
from nanoserve.cuda.executor import CudaExecutor, CudaStarted
from nanoserve.models.weights import random_weights


def main(name: str, precision: str, gemm: str = "mma", chunk: str = "48", how: str = "early") -> None:
    make, start = backend.CudaBackend.make_executor, CudaExecutor.start
    rows: list[int] = []

    def make_executor(self: Any, *args: Any, **options: Any) -> CudaExecutor:
        return make(self, *args, image=image_of, start_early=how == "early", **options)

    def counted(self: CudaExecutor, batch: Batch, *args: Any) -> CudaStarted:
        rows.append(len(batch.input_ids))
        return start(self, batch, *args)

    backend.CudaBackend.make_executor = make_executor  # type: ignore[method-assign]
    CudaExecutor.start = counted  # type: ignore[method-assign]
    config = configs()[name]
    engine = NanoServingEngine(
        config, random_weights(config, 1), precision=BF16 if precision == "bfloat16" else F32, device="cuda",
        kv_cache_pages=64, max_num_batched_tokens=128, max_chunk_size=int(chunk), max_batch_size=4, gemm=gemm,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, size).tolist() for size in (1, 5, 70)]
    executor = engine.executor
    assert isinstance(executor, CudaExecutor)
    told = answers(engine.generate(prompts, GREEDY))
    ptx = "".join(artifact.ptx for artifact in executor.artifacts.values())
    instructions = {"wgmma": "wgmma." in ptx, "tma": "cp.async.bulk.tensor" in ptx}
    about = {"chip": executor.chip.name, "most_rows": max(rows), "counts": executor.counts}
    print(json.dumps({**about, **instructions, "answers": told}))


if __name__ == "__main__":
    main(*sys.argv[1:])

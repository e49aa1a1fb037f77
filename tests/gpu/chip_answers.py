"""Prints what an engine answers on the device that NANOSERVE_FAKE_CUDA_CAPABILITY names: a process knows one device only.

`python -m tests.gpu.chip_answers llama bfloat16 wgmma`: a model of test_cuda_engine, a precision, what multiplies.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from tests.gpu.test_cuda_engine import BF16, F32, GREEDY, answers, configs, image_of

from nanoserve import NanoServingEngine
from nanoserve.cuda import backend
from nanoserve.cuda.executor import CudaExecutor
from nanoserve.models.weights import random_weights


def main(name: str, precision: str, gemm: str = "mma") -> None:
    make = backend.CudaBackend.make_executor

    def make_executor(self: Any, *args: Any, **options: Any) -> CudaExecutor:
        return make(self, *args, image=image_of, **options)

    backend.CudaBackend.make_executor = make_executor  # type: ignore[method-assign]
    config = configs()[name]
    engine = NanoServingEngine(
        config, random_weights(config, 1), precision=BF16 if precision == "bfloat16" else F32, device="cuda", gemm=gemm,
        kv_cache_pages=64, max_num_batched_tokens=128, max_chunk_size=48, max_batch_size=4,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, size).tolist() for size in (1, 5, 70)]
    executor = engine.executor
    assert isinstance(executor, CudaExecutor)
    told = answers(engine.generate(prompts, GREEDY))
    ptx = "".join(artifact.ptx for artifact in executor.artifacts.values())
    print(json.dumps({"chip": executor.chip.name, "wgmma": "wgmma." in ptx, "answers": told}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model on a CPU with less: AVX2 by masking what is newer, AArch64 as far as the wheel's compiler goes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoserve import ModelConfig, NanoServingEngine, SamplingParams, random_weights
from nanoserve.compiler.target import Target
from nanoserve.precision import Precision

CONFIG = ModelConfig(
    vocab_size=193, n_layer=2, n_head=6, n_embd=72, n_kv_head=2, head_dim=24, intermediate_size=120, max_seq_len=512,
    norm="rmsnorm", positions="rope", activation="silu", gated_mlp=True, qkv_bias=True, out_bias=False, mlp_bias=False,
    tie_embeddings=True, qk_norm="head", family="llama",
)  # fmt: skip
PRECISIONS = [Precision(), Precision("bfloat16", "bfloat16"), Precision("int8", "float32")]
NEON = Target(name="neon", lanes=4, registers=32, digest="test")


def answers() -> dict[str, Any]:
    """Per precision: tokens, and log-probabilities to the last bit."""
    found = {}
    for precision in PRECISIONS:
        weights = {name: array * 3 for name, array in random_weights(CONFIG).items()}
        engine = NanoServingEngine(CONFIG, weights, precision=precision)
        params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0)
        requests = engine.generate([[i % 193 for i in range(n)] for n in (3, 40, 90)], params)
        assert all(request.error is None for request in requests)
        found[precision.arithmetic] = [
            (request.output_tokens, [entry.logprob.hex() for entry in request.logprobs])
            for request in requests
        ]
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86")
def test_a_cpu_with_avx2_only_runs_everything() -> None:
    """float32 and int8 with the same bits; bfloat16 close (its dot product rounds in its own way)."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root / "python"), str(root / "tests")])
    run = subprocess.run(
        [sys.executable, "-c", "import json; from compiler.test_targets import answers; print(json.dumps(answers()))"],
        capture_output=True, text=True, env={**os.environ, "NANOSERVE_TARGET": "avx2", "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    masked, own = json.loads(run.stdout), json.loads(json.dumps(answers()))
    assert masked["float32"] == own["float32"]
    assert masked["int8"] == own["int8"]
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(
        masked["bfloat16"], own["bfloat16"], strict=True
    ):
        assert tokens[0] == own_tokens[0]
        assert abs(float.fromhex(logprobs[0]) - float.fromhex(own_logprobs[0])) < 0.1


def test_an_unknown_target_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from nanoserve.compiler.target import host; host()"], capture_output=True, text=True,
        env={**os.environ, "NANOSERVE_TARGET": "avx1024"}, check=False,
    )  # fmt: skip
    assert "NANOSERVE_TARGET: 'avx1024' must be avx2" in run.stderr


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.arithmetic)
def test_every_kernel_of_a_model_lowers_for_aarch64(precision: Precision) -> None:
    """To LLVM's dialect, with nothing of x86 in it; the wheel has no code generator for more."""
    from nanoserve.compiler.jit import build_module, context
    from nanoserve.compiler.lowering import lower

    engine = NanoServingEngine(CONFIG, random_weights(CONFIG), precision=precision)
    for spec in engine.executor.kernels:
        module = build_module(lambda spec=spec: spec.build(NEON))
        with context():
            lower(module, NEON)
        text = str(module)
        assert "llvm.func" in text
        assert "x86" not in text, spec.symbol

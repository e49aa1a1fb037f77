"""Weights that stay 16 bits in memory: the kernels widen them exactly, so nothing that comes out may differ by a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compiler.packed_call import call, padded
from nanoserve import ModelConfig, NanoServingEngine, load_weights
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.kernels import embedding, gemm, panels
from nanoserve.models.weights import bind_weights, loaded_bytes
from support.oracle import make_checkpoint
from support.recording import greedy, record

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Narrow:
    """A matrix of 16-bit elements, every kind among them: subnormal, negative zero, the largest; no NaN or infinity."""

    def __init__(self, n: int, k: int, dtype: str, seed: int = 0) -> None:
        values = torch.from_numpy(
            np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32) * 0.1
        )
        narrow = values.to(DTYPES[dtype])
        flat = narrow.view(-1)
        special = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 1e-5, 60000.0], dtype=torch.float32).to(DTYPES[dtype])
        flat[: min(6, flat.numel())] = special[: flat.numel()]
        self.bits = narrow.view(torch.uint16).numpy()
        self.wide = narrow.float().numpy()
        self.shape = self.wide.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.wide[rows]

    def stored(self, begin: int, end: int) -> np.ndarray:
        return self.bits[begin:end]


@pytest.mark.parametrize("target", [host(), AVX2], ids=["host", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 31), (70, 100), (128, 384), (33, 193), (6000, 49)])
def test_gemm_has_the_bits_of_widened_weights(k: int, n: int, dtype: str, target: Target) -> None:
    weight, rng = Narrow(n, k, dtype), np.random.default_rng(1)
    options = {"bias": True, "activation": "silu", "residual": True}
    bias = panels.pack_bias(rng.standard_normal(n).astype(np.float32), target)
    packed = {name: panels.pack(weight, target, name) for name in ("f32", dtype)}
    assert packed[dtype].nbytes * 2 * k == packed["f32"].nbytes * (k + k % 2 if dtype == "bf16" else k)
    for m in (1, 2, 5, 8, 13, 70):
        x = rng.standard_normal((m, padded(k))).astype(np.float32)
        start = rng.standard_normal((m, padded(n))).astype(np.float32)
        units = -(-n // gemm.panel_width(n, target)) * -(-m // gemm.ROW_BLOCK)
        got = {}
        for name, weights in packed.items():
            spec = gemm.gemm_spec(k, n, padded(k), padded(n), dtype=name, **options)  # type: ignore[arg-type]
            got[name] = start.copy()
            call(spec, x, weights, bias, got[name], m, 0, units, target=target)
        assert got["f32"].tobytes() == got[dtype].tobytes(), m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cols", [1, 7, 48, 100])
def test_embedding_has_the_bits_of_a_widened_table(cols: int, packed: bool, dtype: str) -> None:
    vocab = 131
    table, ids = Narrow(vocab, cols, dtype), np.array([0, 130, 7, 64, 64], np.int32)
    panel = gemm.panel_width(vocab) if packed else 0
    x = np.zeros((5, padded(cols)), np.float32)
    spec = embedding.embedding_spec(cols, padded(cols), scale=3.0, panel=panel, dtype=dtype)
    operand = panels.pack(table, dtype=dtype) if packed else table.bits
    call(spec, ids, np.zeros(5, np.int32), operand, x, 0, 5)
    np.testing.assert_array_equal(x[:, :cols], table.wide[ids] * np.float32(3.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2-dim80", "llama-odd", "qwen3", "phi3", "gemma2", "granite-odd"]
)
def test_a_model_has_the_same_bits_from_half_the_memory(tmp_path: Path, name: str, dtype: str) -> None:
    """A 16-bit checkpoint as it is, against the same numbers given as float32 arrays."""
    path = make_checkpoint(name, tmp_path, dtype=DTYPES[dtype])
    config, stored = ModelConfig.from_pretrained(path), load_weights(path)
    arrays = {key: np.asarray(tensor) for key, tensor in stored.items()}
    assert loaded_bytes(config, bind_weights(config, stored)) < 0.65 * loaded_bytes(
        config, bind_weights(config, arrays)
    )
    prompts = [
        np.random.default_rng(i).integers(0, config.vocab_size, n).tolist() for i, n in enumerate((3, 40, 90))
    ]
    rows = []
    for weights in (stored, arrays):
        engine = NanoServingEngine(config, weights)
        recorder = record(engine)
        finished = engine.generate(prompts, greedy(5, ignore_eos=True))
        rows.append(
            [
                (r.output_tokens, {at: row.tobytes() for at, row in recorder.rows[r.req_id].items()})
                for r in finished
            ]
        )
    assert rows[0] == rows[1]


def test_mixed_parts_become_float32(tmp_path: Path) -> None:
    """q in bfloat16 and k, v in float32 are one matrix: there is no half of a kernel."""
    path = make_checkpoint("llama", tmp_path, dtype=torch.bfloat16)
    config, stored = ModelConfig.from_pretrained(path), dict(load_weights(path))
    name = "model.layers.0.self_attn.k_proj.weight"
    stored[name] = np.asarray(stored[name])
    bound = bind_weights(config, stored)
    assert bound["layers.0.qkv.weight"].dtype == "f32"
    assert bound["layers.1.qkv.weight"].dtype == "bf16"
    assert bound["layers.0.attn_norm.weight"].dtype == "f32"
    engine = NanoServingEngine(config, stored)
    assert len(engine.generate([[1, 2, 3]], greedy(3))[0].output_tokens) <= 3

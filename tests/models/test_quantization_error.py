"""What int8 weights cost: NumPy's numbers, in float64, from the packed arrays; the same ones after a warm start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.random_checkpoint import write_random_checkpoint

import nanoserve
from nanoserve import LLM, ModelConfig
from nanoserve import packed_weights as packed_module
from nanoserve.kernels import panels
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.decoder import gemm_weights
from nanoserve.models.weights import bind_weights, checkpoint_shapes
from nanoserve.native import WeightArena
from nanoserve.quantization_error import QuantizationError, QuantizationReport
from nanoserve.weight_cache import WeightCache

CLOSE = 1e-5  # what float32 rounds of the differences
CONFIG = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of some kilobytes are cached here, in a directory of this test."""
    monkeypatch.setattr(packed_module, "WORTH_CACHING_BYTES", 0)
    monkeypatch.setattr(WeightCache, "open", classmethod(lambda cls: cache_of(tmp_path)))
    (tmp_path / "cache").mkdir(mode=0o700)


def cache_of(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache" / "weights")


def make_checkpoint(path: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    config = {**CONFIG, **changes}
    (path / "config.json").write_text(json.dumps(config))
    return write_random_checkpoint(
        path, config, checkpoint_shapes(ModelConfig.from_pretrained(path)), dtype=dtype
    )


def opened(path: Path, **options: Any) -> LLM:
    """An LLM, with what it writes to the cache written."""
    llm = LLM(path, kv_cache_bytes=2**20, **options)
    if llm.engine.executor.weight_writer is not None:
        llm.engine.executor.weight_writer.join()
    return llm


def expected(weight: np.ndarray) -> tuple[float, float, float]:
    """(||w - w_q||^2, ||w||^2, the worst output's relative error) of the codes and scales that int8 means."""
    wide = weight.astype(np.float64)
    scale = (np.abs(weight).max(axis=1) / np.float32(127)).astype(np.float64)[:, None]
    error, norm = ((np.rint(wide / scale) * scale - wide) ** 2).sum(axis=1), (wide**2).sum(axis=1)
    return error.sum(), norm.sum(), np.sqrt(error / norm).max()


# ---- one weight


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (100, 37), (130, 1024), (64, 5000)])
@pytest.mark.parametrize("gated", [False, True])
def test_the_sums_are_those_of_float64(n: int, k: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_BLOCK_BYTES", 100 * 1024)  # several blocks, from several threads
    weight = np.random.default_rng(k).standard_normal((2 * n, k)).astype(np.float32)
    weight[n // 2] *= 50
    weight[n, k // 2] = 9  # an outlier
    error = panels.pack_int8(weight, gated=gated).error
    wanted = expected(weight)
    assert error.squared_norm == pytest.approx(wanted[1], rel=CLOSE)
    assert error.squared_error == pytest.approx(wanted[0], rel=CLOSE, abs=1e-12 * wanted[1])
    assert error.worst_output == pytest.approx(wanted[2], rel=CLOSE, abs=1e-6)
    assert error.relative_rms == np.sqrt(error.squared_error / error.squared_norm)
    assert error == panels.pack_int8(weight, gated=gated).error, "depends on which thread was first"


def test_codes_cost_nothing() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (70, 40)).astype(np.float32)
    weight[:, 3] = 127  # a scale of exactly 1
    assert panels.pack_int8(weight).error == QuantizationError(
        0, float((weight.astype(np.float64) ** 2).sum()), 0
    )


def test_outputs_that_are_zero_or_become_it_or_are_not_finite() -> None:
    weight = np.random.default_rng(0).standard_normal((70, 40)).astype(np.float32)
    rest = panels.pack_int8(np.delete(weight, [1, 3, 4, 5], axis=0)).error
    weight[1], weight[3, 7], weight[4, 7], weight[5, 7] = 0, np.nan, np.inf, -np.inf
    error = panels.pack_int8(weight).error
    assert (error.squared_error, error.squared_norm) == pytest.approx(
        (rest.squared_error, rest.squared_norm), rel=1e-12
    )
    assert error.worst_output == rest.worst_output
    weight[2] = 1e-37  # its scale would be subnormal
    assert panels.pack_int8(weight).error.worst_output == 1
    nothing = panels.pack_int8(np.zeros((5, 4), np.float32)).error
    assert (nothing, nothing.relative_rms) == (QuantizationError(0, 0, 0), 0)
    lost = panels.pack_int8(np.full((5, 4), 1e-40, np.float32)).error
    assert (lost.relative_rms, lost.worst_output) == (1, 1)


# ---- a model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_reports_every_weight_it_quantised(tmp_path: Path, dtype: str, tied: bool) -> None:
    path = make_checkpoint(tmp_path / "model", dtype, tie_word_embeddings=tied)
    report = opened(path, quantization="int8").quantization_report
    assert report is not None
    config = ModelConfig.from_pretrained(path)
    bound = bind_weights(config, load_weights(path))
    wanted = {name: expected(bound[name][:]) for name in gemm_weights(config)}
    assert set(report.errors) == set(wanted)
    assert len(wanted) == 4 * config.n_layer + 1
    for name, (error, norm, worst) in wanted.items():
        told = report.errors[name]
        assert (told.squared_error, told.squared_norm, told.worst_output) == pytest.approx(
            (error, norm, worst), rel=CLOSE
        )
    total = np.sqrt(sum(each[0] for each in wanted.values()) / sum(each[1] for each in wanted.values()))
    assert report.relative_rms == pytest.approx(total, rel=CLOSE)
    assert report.worst_weight == max(wanted, key=lambda name: wanted[name][0] / wanted[name][1])
    assert report.worst_channel_weight == max(wanted, key=lambda name: wanted[name][2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_reported_where_nothing_is_int8(tmp_path: Path, dtype: str) -> None:
    path = make_checkpoint(tmp_path / "model")
    assert [opened(path, dtype=dtype).quantization_report for _ in range(2)] == [None, None]


def test_a_warm_start_has_the_report_and_reads_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "model")
    cold = opened(path, quantization="int8")

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    for name in ("__getitem__", "stored"):
        monkeypatch.setattr(nanoserve.models.weights.BoundWeight, name, read)
    warm = opened(path, quantization="int8")
    assert warm.engine.executor.weights_were_cached
    assert warm.quantization_report is not None
    assert warm.quantization_report == cold.quantization_report


def flipped(path: Path, numbers: int) -> None:
    """A byte of the last number, as a bad disk would."""
    data = bytearray(path.read_bytes())
    at = 4096 + numbers + 7
    data[at] ^= 1
    path.write_bytes(data)


def rewritten(value: float) -> Callable[[Path, int], None]:
    """A number that no measurement gives, under a checksum that is right."""

    def change(path: Path, numbers: int) -> None:
        data = np.frombuffer(path.read_bytes()[4096:], np.uint8)
        arena = WeightArena(len(data))
        arena.view(0, len(data))[:] = data
        arena.view(numbers, 8).view(np.float64)[:] = value
        WeightCache(path.parent).store(path.stem, arena)

    return change


DAMAGE = {
    "flipped": flipped,
    "nan": rewritten(np.nan),
    "infinite": rewritten(np.inf),
    "negative": rewritten(-1e-9),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_numbers_that_cannot_be_are_measured_again(tmp_path: Path, damage: str) -> None:
    path = make_checkpoint(tmp_path / "model")
    cold = opened(path, quantization="int8")
    (entry,) = cache_of(tmp_path).directory.glob("*.bin")
    DAMAGE[damage](entry, cold.engine.executor.weight_bytes)
    again = opened(path, quantization="int8")
    assert not again.engine.executor.weights_were_cached
    assert again.quantization_report == cold.quantization_report
    warm = opened(path, quantization="int8")
    assert warm.engine.executor.weights_were_cached
    assert warm.quantization_report == cold.quantization_report


# ---- for people


def test_the_lines_name_the_worst() -> None:
    report = QuantizationReport(
        {
            "a": QuantizationError(0.0004, 4, 0.015),
            "b": QuantizationError(0.0009, 1, 0.04),
            "c": QuantizationError(0, 8, 0.5),
        }
    )
    assert report.relative_rms == pytest.approx(0.01)
    assert list(report.lines()) == [
        "int8: 3 weights, relative RMS error 1.00%",
        "int8: the most 3.00% in b; of one output channel 50.00%, in c",
    ]
    assert str(report) == "\n".join(report.lines())

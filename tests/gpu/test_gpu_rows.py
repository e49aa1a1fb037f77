"""Kernels that take a row each: embedding, activations and conversion, block maxima and argmax, copies of pages."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.packed_call import call
from gpu.run_kernel import same_in_every_order
from nanoserve.kernels import logits as cpu_logits
from nanoserve.kernels.cuda.activation import activation_spec, convert_spec
from nanoserve.kernels.cuda.embedding import embedding_spec
from nanoserve.kernels.cuda.layout import row_stride, weight_stride
from nanoserve.kernels.cuda.logits import block_max_spec
from nanoserve.native import LOGITS_BLOCK
from support.bfloat16 import from_bf16, to_bf16

COLS = [1, 3, 33, 64, 132, 1028]
rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def table_of(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A table as it lies in memory, and the float32 it stands for."""
    stored = {"f32": lambda v: v, "bf16": to_bf16, "f16": lambda v: v.astype(np.float16)}[dtype](values)
    padded = np.ones((len(values), weight_stride(values.shape[1], dtype)), stored.dtype)
    padded[:, : values.shape[1]] = stored
    return padded, from_bf16(stored) if dtype == "bf16" else stored.astype(np.float32)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("positions", "scale"), [(False, 1.0), (True, 3.7)])
def test_embedding(cols: int, dtype: str, positions: bool, scale: float) -> None:
    ld = row_stride(cols) + 8
    (table, values), (pos_table, pos_values) = (
        table_of(random(50, cols), dtype),
        table_of(random(40, cols), "f32"),
    )
    ids, pos = rng.integers(0, 50, 5).astype(np.int32), rng.integers(0, 40, 5).astype(np.int32)
    args = [ids, pos, table, *([pos_table] if positions else [])]
    spec = embedding_spec(cols, ld, positions=positions, scale=scale, dtype=dtype)
    x = same_in_every_order(spec, *args, np.full((6, ld), 7, np.float32), 5, out=len(args))
    expected = values[ids] * np.float32(scale) + (pos_values[pos] if positions else np.float32(0))
    assert x[:5, :cols].tobytes() == expected.tobytes()
    assert (x[5:] == 7).all()
    assert (x[:, cols:] == 7).all()


def reference(name: str | None, x: np.ndarray) -> np.ndarray:
    import torch

    t = torch.from_numpy(x.astype(np.float64))
    functions = {
        None: lambda v: v,
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "gelu_erf": torch.nn.functional.gelu,
    }
    return np.asarray(functions[name](t))


@pytest.mark.parametrize("cols", [3, 132, 1028])
@pytest.mark.parametrize("name", [None, "silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("bias", [False, True])
def test_activation(cols: int, name: str | None, bias: bool) -> None:
    ldx, ldo = row_stride(2 * cols), row_stride(cols)
    x, b, out = random(3, ldx) * np.float32(4), random(cols), random(4, ldo)
    spec = activation_spec(cols, ldx, ldo, bias=bias, activation=name, residual=True, scale=1.5, softcap=2.5)
    args = [x, *([b] if bias else []), out, 3]
    done = same_in_every_order(spec, *args, out=1 + bias)
    expected = reference(name, x[:, :cols] + (b if bias else np.float32(0)))
    expected = np.tanh(expected * 1.5 / 2.5) * 2.5 + out[:3, :cols]
    np.testing.assert_allclose(done[:3, :cols], expected, atol=2e-6, rtol=2e-6)
    assert done[3].tobytes() == out[3].tobytes()
    assert done[:, cols:].tobytes() == out[:, cols:].tobytes()


@pytest.mark.parametrize("cols", [3, 132, 1028])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gates(cols: int, dtype: str) -> None:
    ldx, ldo = row_stride(2 * cols), row_stride(cols)
    x, b = random(3, ldx) * np.float32(4), random(2 * cols)
    spec = activation_spec(cols, ldx, ldo, bias=True, activation="silu", gated=True, dtype=dtype)
    empty = np.zeros((3, ldo), np.float32 if dtype == "f32" else np.uint16)
    out = same_in_every_order(spec, x, b, empty, 3, out=2)[:, :cols]
    sums = x[:, : 2 * cols] + b
    expected = reference("silu", sums[:, :cols]) * sums[:, cols:]
    tolerance = 2e-6 if dtype == "f32" else 2**-8
    found = out if dtype == "f32" else from_bf16(out)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=tolerance)


def test_convert_rounds_to_nearest_even() -> None:
    """Subnormals, ties, the largest numbers and NaN, too."""
    bits = rng.integers(0, 2**32, (3, 1024), dtype=np.uint32)
    bits[0, :512] = rng.integers(0, 2**23, 512)  # subnormal
    bits[1, :512] = (bits[1, :512] & 0xFFFF0000) | 0x8000  # ties
    x = bits.view(np.float32)
    out = same_in_every_order(convert_spec(1024, 1024, 1024), x, np.zeros((3, 1024), np.uint16), 3, out=1)
    is_number = ~np.isnan(x)
    assert (out[is_number] == to_bf16(x)[is_number]).all()
    assert np.isnan(from_bf16(out[~is_number])).all()


@pytest.mark.parametrize("vocab", [1, LOGITS_BLOCK - 1, LOGITS_BLOCK, 3 * LOGITS_BLOCK + 70])
@pytest.mark.parametrize("may_forbid", [False, True])
def test_block_max_is_the_cpus(vocab: int, may_forbid: bool) -> None:
    ld, blocks = row_stride(vocab) + 8, cpu_logits.num_blocks(vocab)
    x = random(6, ld)
    x[1, vocab - 1], x[2, 0], x[3, vocab // 2], x[4, :vocab] = np.nan, np.inf, -np.inf, -np.inf
    cpu = np.zeros((6, blocks), np.float32)
    call(
        cpu_logits.block_max_spec(vocab, ld, may_forbid=may_forbid),
        x,
        cpu,
        6,
        0,
        6 * cpu_logits.num_ranges(vocab),
    )
    spec = block_max_spec(vocab, ld, may_forbid=may_forbid)
    gpu = same_in_every_order(spec, x, np.zeros((6, blocks), np.float32), 6, out=1)
    np.testing.assert_array_equal(gpu, cpu)
    assert np.isnan(gpu[1]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: embedding_spec(8, 8, dtype="i8"), "dtype 'i8' must be one of f32, bf16, f16"),
        (lambda: embedding_spec(8, 8, scale=float("nan")), "scale=nan must be finite"),
        (lambda: activation_spec(8, 8, 8, gated=True), "gated needs an activation"),
        (
            lambda: activation_spec(8, 8, 8, activation="silu", gated=True),
            "ldx=8 must be a multiple of 8, at least cols=16",
        ),
        (lambda: activation_spec(8, 8, 8, activation="relu"), "'relu' must be one of"),
        (lambda: activation_spec(8, 8, 8, softcap=-1.0), "softcap=-1.0 must be finite and at least 0"),
        (lambda: block_max_spec(0, 8), "vocab=0 must be positive"),
        (lambda: block_max_spec(9, 8), "ld=8 must be a multiple of 8, at least cols=9"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""RMSNorm and LayerNorm on the GPU against NumPy; bits that depend on the row only; nothing written outside."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.run_kernel import launch, same_in_every_order
from nanoserve.kernels.cuda.norm import KINDS, norm_spec
from support.bfloat16 import to_bf16

COLS = [1, 3, 31, 64, 100, 129, 260, 1028, 4096]
rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def stride(cols: int) -> int:
    return -(-cols // 8) * 8 + 8


def expected(
    kind: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, eps: float
) -> np.ndarray:
    x = x.astype(np.float64)
    if kind == "layernorm":
        x = x - x.mean(axis=1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * weight + bias


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gather", [False, True])
def test_norm(cols: int, kind: str, gather: bool) -> None:
    bias = kind == "layernorm"
    ld, eps = stride(cols), 1e-5
    x, weight, shift = random(7, ld) + np.float32(3), random(cols), random(cols)
    rows = np.array([4, 6, 4, 0], dtype=np.int32)
    spec = norm_spec(kind, cols, ld, ld, eps, bias=bias, gather=gather)
    args = [x, *([rows] if gather else []), weight, *([shift] if bias else [])]
    out, m = np.full((9, ld), 7, dtype=np.float32), 4 if gather else 7
    result = same_in_every_order(spec, *args, out, m, out=len(args))
    wanted = expected(kind, (x[rows] if gather else x)[:, :cols], weight, shift if bias else 0.0, eps)
    np.testing.assert_allclose(result[:m, :cols], wanted, atol=3e-5, rtol=3e-5)
    assert (result[m:] == 7).all()
    assert (result[:m, cols:] == 7).all()


@pytest.mark.parametrize("cols", [33, 260])
def test_residual_is_added_to_what_is_there(cols: int) -> None:
    ld = stride(cols)
    x, weight, out = random(3, ld), random(cols), random(3, ld)
    plain = same_in_every_order(norm_spec("rmsnorm", cols, ld, ld, 1e-6), x, weight, out, 3, out=2)
    added = same_in_every_order(
        norm_spec("rmsnorm", cols, ld, ld, 1e-6, residual=True), x, weight, out, 3, out=2
    )
    assert added[:, :cols].tobytes() == (out + plain)[:, :cols].tobytes()


def test_bfloat16_is_the_float32_rounded() -> None:
    cols = 260
    ld = stride(cols)
    x, weight = random(3, ld), random(cols)
    wide = same_in_every_order(
        norm_spec("rmsnorm", cols, ld, ld, 1e-6), x, weight, np.zeros((3, ld), np.float32), 3, out=2
    )
    spec = norm_spec("rmsnorm", cols, ld, ld, 1e-6, dtype="bf16")
    narrow = same_in_every_order(spec, x, weight, np.zeros((3, ld), np.uint16), 3, out=2)
    assert narrow[:, :cols].tobytes() == to_bf16(wide[:, :cols]).tobytes()


def test_in_place() -> None:
    cols = 1028
    ld = stride(cols)
    x, weight = random(3, ld), random(cols)
    spec = norm_spec("layernorm", cols, ld, ld, 1e-6)
    apart, same = np.zeros((3, ld), np.float32), x.copy()
    launch(spec, x, weight, apart, 3)
    launch(spec, same, weight, same, 3, order=2)
    assert same[:, :cols].tobytes() == apart[:, :cols].tobytes()


def test_a_row_has_the_same_bits_anywhere() -> None:
    cols = 260
    ld = stride(cols)
    x, weight = random(9, ld), random(cols)
    spec = norm_spec("rmsnorm", cols, ld, ld, 1e-6)
    alone, last = np.zeros((1, ld), np.float32), np.zeros((9, ld), np.float32)
    launch(spec, x[8:], weight, alone, 1)
    launch(spec, x, weight, last, 9)
    assert alone[0, :cols].tobytes() == last[8, :cols].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "batchnorm"}, "kind 'batchnorm' must be one of"),
        ({"cols": 0}, r"cols=0 must be in \[1,"),
        ({"ldx": 12}, "ldx=12 must be a multiple of 8"),
        ({"ldo": 8}, "ldo=8 must be a multiple of 8, at least cols=16"),
        ({"dtype": "u8"}, "dtype 'u8' must be one of"),
        ({"dtype": "bf16", "residual": True}, "cannot be added"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_spec(**{"kind": "rmsnorm", "cols": 16, "ldx": 16, "ldo": 16, "eps": 1e-5, **change})

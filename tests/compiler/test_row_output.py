"""Rows as GEMMs read them: bfloat16 and 8 bits against NumPy, from the norm and from the conversion kernel."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.packed_call import call, padded
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.kernels import convert, norm
from support.bfloat16 import to_bf16

COLS = [1, 2, 15, 16, 17, 63, 64, 100, 127, 259, 1024]
rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, scale per row) in the kernel's own float32 steps."""
    largest = np.maximum(np.abs(x).max(axis=1), np.float32(1e-30))
    inverse = np.float32(127) / largest
    return (np.rint(x * inverse[:, None]) + 128).astype(np.uint8), largest * np.float32(1 / 127)


@pytest.mark.parametrize("target", [host(), AVX2], ids=["host", "avx2"])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", convert.DTYPES)
def test_convert(cols: int, dtype: str, target: Target) -> None:
    x = random(9, padded(cols)) * np.float32(3)
    x[3] = 0
    x[4, 0] = -1e5  # an outlier, and a negative one
    ldo = cols + 5
    out = np.full((11, ldo), 7, np.uint16 if dtype == "bf16" else np.uint8)
    scales = np.full(11, 7, np.float32)
    spec = convert.convert_spec(cols, x.shape[1], ldo, dtype)
    args = [x, out, *([scales] if dtype == "u8" else [])]
    call(spec, *args, 0, 2, target=target)
    assert (out[2:] == 7).all()
    assert (scales[2:] == 7).all()
    call(spec, *args, 2, 9, target=target)
    assert (out[9:] == 7).all()
    assert (out[:9, cols:] == 7).all()
    if dtype == "bf16":
        assert out[:9, :cols].tobytes() == to_bf16(x[:, :cols].copy()).tobytes()
        return
    expected, scale = quantised(x[:, :cols])
    assert scales[:9].tobytes() == scale.tobytes()
    assert out[:9, :cols].tobytes() == expected.tobytes()
    assert scales[9:].tobytes() == np.full(2, 7, np.float32).tobytes()
    back = (out[:9, :cols].astype(np.float32) - 128) * scale[:, None]
    assert (np.abs(back - x[:, :cols]) <= scale[:, None] * 0.501).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 37, 39])
def test_a_row_that_is_not_finite_has_no_finite_scale(bad: float, at: int) -> None:
    x = random(3, 40)
    clean = x.copy()
    x[1, at] = bad
    out, scales = np.zeros((3, 40), np.uint8), np.zeros(3, np.float32)
    call(convert.convert_spec(40, 40, 40, "u8"), x, out, scales, 0, 3)
    assert not np.isfinite(scales[1])
    expected, scale = quantised(clean)
    assert scales[::2].tobytes() == scale[::2].tobytes()
    assert out[::2].tobytes() == expected[::2].tobytes()


@pytest.mark.parametrize("cols", [1, 33, 64, 100])
@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "u8"])
def test_a_norm_writes_what_converting_its_float32_would(
    cols: int, kind: str, gather: bool, dtype: str
) -> None:
    bias = kind == "layernorm"
    x, operands = random(9, padded(cols)), [random(cols) for _ in range(1 + bias)]
    rows = [np.array([4, 1, 8, 4], np.int32)] if gather else []
    count, ldo = (4 if gather else 9), cols + 3
    wide = np.zeros((count, ldo), np.float32)
    sizes = (kind, cols, x.shape[1], ldo, 1e-6)
    call(norm.norm_spec(*sizes, bias=bias, gather=gather), x, *rows, *operands, wide, 0, count)
    item = np.uint16 if dtype == "bf16" else np.uint8
    expected, out = np.zeros((count, ldo), item), np.zeros((count, ldo), item)
    scales, expected_scales = np.zeros(count, np.float32), np.zeros(count, np.float32)
    more = [scales] if dtype == "u8" else []
    call(
        convert.convert_spec(cols, ldo, ldo, dtype),
        wide,
        expected,
        *([expected_scales] if more else []),
        0,
        count,
    )
    spec = norm.norm_spec(*sizes, bias=bias, gather=gather, dtype=dtype)
    call(spec, x, *rows, *operands, out, *more, 0, 2)
    call(spec, x, *rows, *operands, out, *more, 2, count)
    assert out.tobytes() == expected.tobytes()
    assert scales.tobytes() == expected_scales.tobytes()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: convert.convert_spec(5, 4, 8, "bf16"), "cols=5"),
        (lambda: convert.convert_spec(5, 8, 8, "f16"), "f16"),
        (lambda: norm.norm_spec("rmsnorm", 5, 5, 5, 1e-5, dtype="i8"), "i8"),
        (lambda: norm.norm_spec("rmsnorm", 5, 20, 20, 1e-5, residual=True, dtype="bf16"), "leave residual out"),
    ],
)  # fmt: skip
def test_refusals(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        make()

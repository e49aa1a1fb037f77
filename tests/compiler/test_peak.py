"""The kernels that measure the machine do the work they are counted for."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.packed_call import call
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.kernels import peak
from support.bfloat16 import from_bf16, to_bf16

TARGETS = [host(), *([AVX2] if host().name in ("avx512", "avx2") else [])]


def test_read_sees_every_byte_of_its_units() -> None:
    """The exclusive or of all lines; a bit that is not read is missing there."""
    data = np.random.default_rng(0).integers(-(2**31), 2**31, (5, peak.READ_BYTES // 4)).astype(np.int32)
    out = np.full((5, 16), 7, np.int32)
    call(peak.read_spec(), data, out, 1, 4)
    expected = np.bitwise_xor.reduce(data.reshape(5, -1, 16), axis=1)
    assert (out[1:4] == expected[1:4]).all()
    assert (out[[0, 4]] == 7).all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("arithmetic", peak.ARITHMETICS)
def test_dots_are_as_many_as_counted(arithmetic: str, target: Target) -> None:
    """Small integers, so that every sum is exact whatever its order: the tile's sum over all steps and passes."""
    rng = np.random.default_rng(1)
    group = peak.ARITHMETICS[arithmetic]
    x = rng.integers(0, 3, (peak.STEPS, 8, group))
    w = rng.integers(-2, 3, (peak.STEPS, 48, group))
    rows, vectors = peak.tile(target)
    if arithmetic == "f32":
        operands = [x.astype(np.float32), w.astype(np.float32)]
    elif arithmetic == "bf16":
        operands = [to_bf16(x.astype(np.float32)), to_bf16(w.astype(np.float32))]
        assert (from_bf16(operands[1]) == w).all()
    else:
        operands = [x.astype(np.uint8), w.astype(np.int8)]
    out = np.full((3, 16), 5, np.int32 if arithmetic == "int8" else np.float32)
    call(peak.dot_spec(arithmetic), *operands, out, 1, 2, target=target)
    tile = np.einsum("srg,svlg->l", x[:, :rows], w.reshape(peak.STEPS, 3, 16, group)[:, :vectors])
    assert out[1].tolist() == (tile * peak.UNIT_PASSES).tolist()
    assert (out[[0, 2]] == 5).all()
    products = rows * vectors * 16 * group * peak.STEPS * peak.UNIT_PASSES
    assert peak.unit_dots(arithmetic, target) == products


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="'f64' must be one of f32, bf16, int8"):
        peak.dot_spec("f64")

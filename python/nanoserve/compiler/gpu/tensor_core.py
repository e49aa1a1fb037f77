"""Authoring layer for GPU kernels, part four: matrix products of a warp (mma.sync), and how their operands are read.

A fragment is what one lane has of a matrix, as vectors of two neighbours along k. Of m16n8k16: x (16 x 16) is four
such pairs, w (8 x 16) two, and the sums (16 x 8) two pairs along n, of rows l / 4 and l / 4 + 8 for lane l.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoserve.compiler.bindings import mlir, mlir_gpu
from nanoserve.compiler.builder import Operand, Value, const, index, type_of
from nanoserve.compiler.gpu.memory import Array

nvgpu, vector = mlir_gpu().nvgpu, mlir().vector


def load_matrices(source: Array, at: Sequence[Operand], count: int) -> Value:
    """`count` matrices of 8 x 8 bfloat16 from shared memory: pair i is this lane's of matrix i.

    Lane l says with its own `at` where row l % 8 of matrix l / 8 begins, 16 bytes of it.
    """
    kind = type_of(f"vector<{count}x2xbf16>")
    return Value(nvgpu.ldmatrix(kind, source.ir, [index(i).ir for i in at], False, count))


def halves(fragment: Value) -> list[Value]:
    """The first two pairs of four, and the other two."""
    kind = type_of("vector<2x2xbf16>")
    return [Value(vector.extract_strided_slice(kind, fragment.ir, [first], [2], [1])) for first in (0, 2)]


def no_sums() -> Value:
    return Value(vector.broadcast(type_of("vector<2x2xf32>"), const(0.0, "f32").ir))


def mma_bf16(x: Value, w: Value, sums: Value) -> Value:
    """sums + x * w^T, of bfloat16 m16n8k16; all lanes of the warp must get here."""
    return Value(nvgpu.mma_sync(type_of("vector<2x2xf32>"), x.ir, w.ir, sums.ir, [16, 8, 16]))


def row_pairs(first: Value, second: Value) -> Value:
    """Sums of the lane's two rows."""
    whole = no_sums().ir
    for at, pair in enumerate((first, second)):
        whole = vector.insert(pair.ir, whole, [], [at])
    return Value(whole)


def row_pair(sums: Value, half: int) -> Value:
    """Two neighbouring sums: of the lane's first row, or of its second."""
    return Value(vector.extract(sums.ir, [], [half]))

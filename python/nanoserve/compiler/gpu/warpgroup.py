"""Authoring layer for GPU kernels, part five: matrix products of a warpgroup (wgmma), four warps of sm_90a together.

Both operands are read from shared memory by the tensor cores themselves, through descriptors, in tiles of rows of 128
bytes (64 bfloat16) that begin on 1024 bytes; line c of row r lies at place c ^ (r % 8), the hardware's 128-byte
swizzle. The product runs while the threads go on: `multiply` between begin() and finish().
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.bindings import mlir, mlir_gpu
from nanoserve.compiler.builder import Value, const, ir, type_of
from nanoserve.compiler.gpu.memory import Array

nvvm, memref, arith, llvm = mlir_gpu().nvvm, mlir().memref, mlir().arith, mlir().llvm

ROWS = 64  # of the first operand
ROW_BYTES, GROUP_BYTES = 128, 1024  # a row of a tile; 8 rows, after which the swizzle repeats
STEP_BYTES = 32  # 16 bfloat16: k of an instruction
# Of a descriptor: the swizzle (1: 128 bytes), the distance between groups of 8 rows, and one swizzled tiles do not use.
_CONSTANT_BITS = 1 << 62 | (GROUP_BYTES >> 4) << 32 | 1 << 16
_ADDRESS_BITS = 0x3FFFF


def address_of(tile: Array) -> Value:
    """Where an array of shared memory begins, as i64."""
    return Value(arith.index_cast(type_of("i64"), memref.extract_aligned_pointer_as_index(tile.ir)))


def integer(number: Value) -> Value:
    """An index as i64, to calculate addresses with."""
    return Value(arith.index_cast(type_of("i64"), number.ir))


def descriptor(address: Value) -> Value:
    """Of the tile that begins there."""
    return ((address & _ADDRESS_BITS) >> 4) | _CONSTANT_BITS


def advanced(of_tile: Value, steps: int) -> Value:
    """The same tile's descriptor, so many instructions further along k."""
    return of_tile + steps * (STEP_BYTES >> 4)


def _sums_type(columns: int) -> Any:
    return type_of(f"!llvm.struct<({', '.join(['f32'] * (columns // 2))})>")


def no_sums(columns: int) -> Value:
    """Zeros: of 64 x columns, what one thread has."""
    return Value(llvm.mlir_zero(_sums_type(columns)))


def begin() -> None:
    nvvm.wgmma_fence_aligned()


def multiply(rows: Value, columns: Value, sums: Value, num_columns: int) -> Value:
    """sums + rows * columns^T over 16 k, of descriptors; all threads of the warpgroup must get here."""
    one, kind = ir.Attribute.parse("#nvvm.wgmma_scale_in<one>"), ir.Attribute.parse("#nvvm.wgmma_type<bf16>")
    return Value(
        nvvm.wgmma_mma_async(
            sums.type, sums.ir, rows.ir, columns.ir,
            ir.Attribute.parse(f"#nvvm.shape<m = {ROWS}, n = {num_columns}, k = 16>"),
            kind, kind, ir.Attribute.parse("#nvvm.wgmma_type<f32>"),
            ir.Attribute.parse("#nvvm.wgmma_scale_out<one>"), one, one,
            ir.Attribute.parse("#nvvm.mma_layout<row>"), ir.Attribute.parse("#nvvm.mma_layout<col>"),
        )
    )  # fmt: skip


def finish() -> None:
    """Wait for the products begun; their sums may be used, and their tiles overwritten."""
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(0)


def added(sums: Value, more: Value, columns: int) -> Value:
    """Both together, sum by sum."""
    both = Value(llvm.mlir_undef(sums.type))
    for i in range(columns // 2):
        at = ir.DenseI64ArrayAttr.get([i])
        both = Value(llvm.insertvalue(both.ir, (sum_at(sums, i) + sum_at(more, i)).ir, at))
    return both


def sum_at(sums: Value, i: int) -> Value:
    """Of thread t = 32 * w + l: row 16 * w + l / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (l % 4) + i % 2."""
    return Value(llvm.extractvalue(const(0.0, "f32").type, sums.ir, ir.DenseI64ArrayAttr.get([i])))

"""Run every kernel on arrays that end where a page without access begins: one element too far is a crash.

Run as a program, with the kind as its argument, so that a crash is this process's only.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from itertools import product

import numpy as np

from compiler.gemm_problem import NarrowMatrix
from compiler.packed_call import call
from nanoserve.kernels import attention, convert, embedding, gemm, kv_write, norm, panels, peak
from nanoserve.models.rope import Rope
from support.bfloat16 import to_bf16

_maps: list[mmap.mmap] = []


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy that ends at the end of accessible memory."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    _maps.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[:] = array
    return copy


def rows(count: int, stride: int, used: int) -> np.ndarray:
    """Rows of which the last is cut off after the columns in use."""
    return guarded(np.ones((count - 1) * stride + used, dtype=np.float32))


def ints(*values: int) -> np.ndarray:
    return guarded(np.array(values, dtype=np.int32))


def run_gemm() -> None:
    for k, n in ((1, 1), (20, 70), (33, 100), (9000, 20)):
        width = gemm.panel_width(n)
        padded = -(-n // width) * width
        ldx, ldy = k + 16, padded + 16
        spec = gemm.gemm_spec(
            k, n, ldx, ldy, bias=True, residual=True, activation="gelu_tanh", softcap=3.0, scale=2.0
        )
        w, b = guarded(panels.pack(np.ones((n, k)))), guarded(panels.pack_bias(np.ones(n)))
        for m in (*range(1, 20), 63, 64, 65, 70):
            units = padded // width * -(-m // gemm.ROW_BLOCK)
            call(spec, rows(m, ldx, k), w, b, rows(m, ldy, padded), m, 0, units)


def run_narrow_gemm() -> None:
    """bfloat16 and int8, gated and not; a row of x ends with the last group of k."""
    for (x, dtype, element), (k, n), is_gated in product(
        (("bf16", "bf16", np.uint16), ("u8", "i8", np.uint8)), ((1, 1), (20, 70), (33, 100), (4100, 20)), (False, True)
    ):  # fmt: skip
        width, group, n_rows = gemm.panel_width(n), gemm.GROUP[dtype], n * (1 + is_gated)
        padded, used = -(-n // width) * width, -(-k // group) * group
        ldx, ldy = used + 16, padded + 16
        spec = gemm.gemm_spec(
            k, n, ldx, ldy, x=x, dtype=dtype, y="bf16", bias=True, gated=is_gated, activation="silu"
        )
        ones = np.ones((n_rows, k), np.float32)
        if dtype == "i8":
            packed = panels.pack_int8(ones, gated=is_gated)
            weight = [guarded(packed.panels), guarded(packed.scale), guarded(packed.sums)]
        else:
            weight = [guarded(panels.pack(NarrowMatrix(to_bf16(ones)), dtype="bf16", gated=is_gated))]
        bias = guarded(panels.pack_bias(np.ones(n_rows), gated=is_gated))
        for m in (*range(1, 20), 63, 64, 65, 70):
            x_rows = guarded(np.ones((m - 1) * ldx + used, element))
            scales = [guarded(np.ones(m, np.float32))] if dtype == "i8" else []
            y = guarded(np.ones((m - 1) * ldy + padded, np.uint16))
            call(spec, x_rows, *scales, *weight, bias, y, m, 0, padded // width * -(-m // gemm.ROW_BLOCK))


def run_peak() -> None:
    data = guarded(np.ones((2, peak.READ_BYTES // 4), np.int32))
    call(peak.read_spec(), data, guarded(np.ones((2, 16), np.int32)), 0, 2)
    for arithmetic in peak.ARITHMETICS:
        x, w = (guarded(np.ones((peak.STEPS, cols), np.float32)) for cols in (8, 48))
        call(peak.dot_spec(arithmetic), x, w, guarded(np.ones((2, 16), np.float32)), 0, 2)


def run_attention() -> None:
    for heads, kv, d, page_size in ((4, 2, 20, 16), (2, 2, 16, 32), (3, 1, 7, 64)):
        for length in (1, 16, 63, 64, 65, 128, 130):
            pages = -(-length // page_size)
            k, v = keys_and_values(pages, kv, d, page_size)
            entries = -(-(-(-length // 64) + 1) * 64 // page_size)
            table = ints(*(min(i, pages - 1) for i in range(entries)))
            q, out = (rows(length, heads * d + 5, heads * d) for _ in range(2))
            tilings = (attention.Tiling(heads // kv), attention.tilings(heads // kv, kv, d)[1])
            for tiling, window in product(tilings, (0, 20, 64)):
                total, most = length * heads // kv, tiling.rows * tiling.tiles
                items = [
                    (0, head, 1, 0, r0, min(most, total - r0), 0, 0, 1, -1, 0, 0, -1, 0, 0, 0)
                    for head in range(kv)
                    for r0 in range(0, total, most)
                ]
                row = heads * d + 5
                spec = attention.attention_spec(heads, kv, d, page_size, row, row, tiling, window=window)
                flat = guarded(np.array(items, dtype=np.int32))
                call(spec, q, k, v, table, flat, np.empty(0, dtype=np.float32), out, 0, len(items))
            small = attention.tilings(heads // kv, kv, d)[0]
            spec = attention.attention_spec(heads, kv, d, page_size, row, row, small)
            # One token in two parts (of a segment each, the second wholly masked), and what merges them.
            stride = attention.part_floats(d, small, small.rows * kv) // 16
            first = (0, 0, kv, 0, 0, small.rows, 0, 0, 1, 0, stride, 0, -1, 0, 0, 0)
            second = (*first[:7], 1, 2, stride, stride, 0, -1, 0, 0, 0)
            merge = (*first[:7], 0, 0, 0, stride, 2, -1, 0, 0, 0)
            flat = guarded(np.array([first, second, merge], dtype=np.int32))
            call(spec, q, k, v, table, flat, guarded(np.ones(2 * stride * 16, dtype=np.float32)), out, 0, 3)


def keys_and_values(
    pages: int, kv: int, d: int, page_size: int, dtype: type = np.float32
) -> tuple[np.ndarray, ...]:
    """The array of the layer, and the same from its first values on."""
    layer = guarded(np.ones(pages * kv * 2 * d * page_size, dtype=dtype))
    return layer, layer[d * page_size :]


def run_norm() -> None:
    for cols in (1, 15, 16, 33, 64, 100, 128, 259):
        weight, bias = guarded(np.ones(cols, dtype=np.float32)), guarded(np.ones(cols, dtype=np.float32))
        spec = norm.norm_spec("layernorm", cols, cols + 3, cols + 5, 1e-5, bias=True)
        call(spec, rows(4, cols + 3, cols), weight, bias, rows(4, cols + 5, cols), 0, 4)
        spec = norm.norm_spec("rmsnorm", cols, cols + 3, cols + 5, 1e-5, gather=True)
        call(spec, rows(4, cols + 3, cols), ints(3, 0), weight, rows(2, cols + 5, cols), 0, 2)
        spec = norm.norm_spec("rmsnorm", cols, cols + 3, cols + 5, 1e-5, residual=True)
        call(spec, rows(4, cols + 3, cols), weight, rows(4, cols + 5, cols), 0, 4)
        spec = norm.norm_spec("rmsnorm", cols, cols + 3, cols + 5, 1e-5, dtype="u8")
        quantised = guarded(np.zeros(3 * (cols + 5) + cols, np.uint8))
        call(spec, rows(4, cols + 3, cols), weight, quantised, guarded(np.zeros(4, np.float32)), 0, 4)


def run_embedding() -> None:
    for cols in (1, 16, 33, 100):
        spec = embedding.embedding_spec(cols, cols + 3, positions=True)
        call(
            spec,
            ints(4, 0),
            ints(2, 0),
            rows(5, cols, cols),
            rows(3, cols, cols),
            rows(2, cols + 3, cols),
            0,
            2,
        )
        for vocab in (48, 50):
            spec = embedding.embedding_spec(cols, cols + 3, panel=gemm.panel_width(vocab), scale=2.0)
            table = guarded(panels.pack(np.ones((vocab, cols))))
            call(spec, ints(vocab - 1, 0), ints(0, 0), table, rows(2, cols + 3, cols), 0, 2)


def run_convert() -> None:
    for cols, (dtype, element) in product((1, 15, 16, 33, 100), (("bf16", np.uint16), ("u8", np.uint8))):
        out = guarded(np.zeros(3 * (cols + 5) + cols, element))
        scales = [guarded(np.zeros(4, np.float32))] if dtype == "u8" else []
        call(
            convert.convert_spec(cols, cols + 3, cols + 5, dtype), rows(4, cols + 3, cols), out, *scales, 0, 4
        )


def run_kv_write() -> None:
    for heads, kv, d, rotary in ((4, 2, 20, 20), (2, 2, 7, 0), (1, 1, 80, 34)):
        row = (heads + 2 * kv) * d
        for dtype, slots in product(("f32", "bf16"), ((31, 0), tuple(range(16, 32)), tuple(range(13, 32)))):
            if dtype == "bf16" and d % 2:
                continue
            spec = kv_write.kv_write_spec(heads, kv, d, 16, row + 3, rotary, qk_norm="row", dtype=dtype)
            rope = [guarded(Rope(rotary, 1e4).table(9)), ints(*[8] * len(slots))] if rotary else []
            norms = [guarded(np.ones(n * d, dtype=np.float32)) for n in (heads, kv)]
            k, v = keys_and_values(2, kv, d, 16, np.float32 if dtype == "f32" else np.uint16)
            call(spec, rows(len(slots), row + 3, row), *rope, *norms, k, v, ints(*slots), 0, len(slots))


def run_overrun() -> None:
    """The mutant: a row too many. It must crash, or the others prove nothing."""
    cols = 16
    call(
        convert.convert_spec(cols, cols, cols, "bf16"),
        rows(3, cols, cols),
        guarded(np.zeros(64, np.uint16)),
        0,
        4,
    )


if __name__ == "__main__":
    globals()[f"run_{sys.argv[1]}"]()
    print("done")

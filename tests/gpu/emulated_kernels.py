"""Kernels for tests of the emulator, as text: each synchronises in a way of its own.

Shapes need not fit the tiles: rows that do not exist are read as the last one and not written, columns of k that do not exist
are zero.
"""

from __future__ import annotations

from gpu.llvm_kernel import Kernel, Value

GLOBAL = "ptr addrspace(1)"
GEMM_PARAMS = {"a": GLOBAL, "b": GLOBAL, "c": GLOBAL, "m": "i32", "n": "i32", "k": "i32"}
ALL_LANES = -1

NORM_THREADS = 128
F32_TILE, F32_TILE_K, F32_THREADS = 32, 8, 64
MMA_TILE, MMA_TILE_K, MMA_THREADS = 64, 32, 128
WGMMA_TILE, WGMMA_TILE_K, WGMMA_THREADS, WGMMA_STAGES = 64, 64, 128, 3


def rms_norm() -> str:
    """y[row] = x[row] / sqrt(mean(x[row]^2) + eps) * w; a block per row, its sum by shuffles and shared memory."""
    params = {"x": GLOBAL, "w": GLOBAL, "y": GLOBAL, "n": "i32", "eps": "float"}
    k = Kernel("rms_norm", params, {"partial": (16, 16)})
    n = k.p["n"]
    thread = k.sreg("tid.x")
    row = k.sreg("ctaid.x") * n

    def square(i: Value, total: Value) -> list[Value]:
        x = k.load(k.p["x"], row + i, "float")
        return [total + x * x]

    (total,) = k.loop(thread, n, NORM_THREADS, [k.const(0, "float")], square)
    for distance in (16, 8, 4, 2, 1):
        operands = [k.const(ALL_LANES), total, k.const(distance), k.const(31)]
        total = total + k.call("float", "llvm.nvvm.shfl.sync.bfly.f32", *operands)
    partial = k.shared("partial")
    k.when((thread % 32).compare("eq", 0), lambda: k.store(total, partial, thread // 32))
    k.barrier("partial sums written")
    whole = k.const(0, "float")
    for warp in range(NORM_THREADS // 32):
        whole = whole + k.load(partial, warp, "float")
    mean = whole / k.cast("uitofp", n, "float") + k.p["eps"]
    scale = k.const(1, "float") / k.call("float", "llvm.sqrt.f32", mean)

    def write(i: Value) -> list[Value]:
        x = k.load(k.p["x"], row + i, "float")
        k.store(x * scale * k.load(k.p["w"], i, "float"), k.p["y"], row + i)
        return []

    k.loop(thread, n, NORM_THREADS, [], write)
    return k.text()


def gemm_f32() -> str:
    """C[m, n] = A[m, k] B[k, n], float; 32 x 32 x 8 tiles in shared memory, 4 x 4 sums per thread."""
    tile_bytes = F32_TILE * F32_TILE_K * 4
    k = Kernel("gemm_f32", GEMM_PARAMS, {"tile_a": (tile_bytes, 16), "tile_b": (tile_bytes, 16)})
    m, n, depth = k.p["m"], k.p["n"], k.p["k"]
    thread = k.sreg("tid.x")
    first_row, first_col = k.sreg("ctaid.y") * F32_TILE, k.sreg("ctaid.x") * F32_TILE
    row, col = thread // 8 * 4, thread % 8 * 4
    tile_a, tile_b = k.shared("tile_a"), k.shared("tile_b")

    def step(at: Value, *sums: Value) -> list[Value]:
        for i in range(F32_TILE * F32_TILE_K // F32_THREADS):
            element = thread + i * F32_THREADS
            r, kk = element // F32_TILE_K, element % F32_TILE_K
            inside = (first_row + r < m) & (at + kk < depth)
            a = k.load_or_zero(inside, k.p["a"], (first_row + r) * depth + at + kk)
            k.store(a, tile_a, kk * F32_TILE + r)
            kk, c = element // F32_TILE, element % F32_TILE
            inside = (first_col + c < n) & (at + kk < depth)
            b = k.load_or_zero(inside, k.p["b"], (at + kk) * n + first_col + c)
            k.store(b, tile_b, kk * F32_TILE + c)
        k.barrier("tiles written")
        new = list(sums)
        for kk in range(F32_TILE_K):
            vectors = [
                k.load(tile, place + kk * F32_TILE, "<4 x float>", "float")
                for tile, place in ((tile_a, row), (tile_b, col))
            ]
            a, b = (
                [k.value(f"extractelement {v.typed}, i32 {i}", "float") for i in range(4)] for v in vectors
            )
            new = [new[4 * i + j] + a[i] * b[j] for i in range(4) for j in range(4)]
        k.barrier("tiles read")
        return new

    sums = k.loop(k.const(0), depth, F32_TILE_K, [k.const(0, "float")] * 16, step)
    for i in range(4):
        for j in range(4):
            r, c = first_row + row + i, first_col + col + j
            k.when(
                (r < m) & (c < n), lambda i=i, j=j, r=r, c=c: k.store(sums[4 * i + j], k.p["c"], r * n + c)
            )
    return k.text()


def _copy_async(k: Kernel, tile: Value, offset: Value, source: Value, index: Value, k_left: Value) -> None:
    """Eight bf16, those behind the end of k as zero: from source[index] to the byte `offset` of a tile."""
    some = k.select(k.const(0) < k_left, k.least(k_left * 2, k.const(16)), k.const(0))
    # Where nothing is read the address may point anywhere: take the first.
    element = k.select(k.const(0) < k_left, index, k.const(0))
    to, of = k.at(tile, offset, "i8"), k.at(source, element, "i16")
    k.call("void", "llvm.nvvm.cp.async.cg.shared.global.16.s", to, of, some)


def _commit(k: Kernel) -> None:
    k.call("void", "llvm.nvvm.cp.async.commit.group")


def _wait(k: Kernel, groups: int, tag: str) -> None:
    k.call("void", "llvm.nvvm.cp.async.wait.group", k.const(groups), tag=tag)


def _rows(k: Kernel, first: Value, row: Value, count: Value) -> Value:
    return k.least(first + row, count - 1)


def gemm_mma() -> str:
    """C[m, n] = A[m, k] B[n, k]^T from bf16, k a multiple of 8.

    64 x 64 x 32 tiles, double-buffered by cp.async, rows padded to 80 bytes; 2 x 2 warps of 32 x 32, by ldmatrix and
    mma.sync m16n8k16.
    """
    row_bytes = MMA_TILE_K * 2 + 16
    stage_bytes = MMA_TILE * row_bytes
    k = Kernel("gemm_mma", GEMM_PARAMS, {"tile_a": (2 * stage_bytes, 16), "tile_b": (2 * stage_bytes, 16)})
    m, n, depth = k.p["m"], k.p["n"], k.p["k"]
    thread = k.sreg("tid.x")
    lane, warp = thread % 32, thread // 32
    first_row, first_col = k.sreg("ctaid.y") * MMA_TILE, k.sreg("ctaid.x") * MMA_TILE
    warp_row, warp_col = warp // 2 * 32, warp % 2 * 32
    tiles = (
        (k.shared("tile_a"), k.p["a"], first_row, m),
        (k.shared("tile_b"), k.p["b"], first_col, n),
    )

    def fetch(stage: Value, at: Value) -> None:
        for tile, source, first, count in tiles:
            for part in range(MMA_TILE * MMA_TILE_K // 8 // MMA_THREADS):
                row = thread // 4 + 32 * part
                kk = thread % 4 * 8
                offset = stage * stage_bytes + row * row_bytes + kk * 2
                index = _rows(k, first, row, count) * depth + at + kk
                _copy_async(k, tile, offset, source, index, depth - at - kk)
        _commit(k)

    def fragments(tile: Value, stage: Value, row: Value, kk: int) -> list[Value]:
        """Four 8 x 8 matrices: rows `row` and 8 further, then the same 8 columns to the right."""
        offset = stage * stage_bytes + (row + lane % 16) * row_bytes + (lane // 16 * 8 + kk) * 2
        whole = k.call(
            "{ i32, i32, i32, i32 }",
            "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.b16.p3",
            k.at(tile, offset, "i8"),
        )
        return k.members(whole, 4, "i32")

    def step(at: Value, stage: Value, *sums: Value) -> list[Value]:
        fetch(k.const(1) - stage, at + MMA_TILE_K)
        _wait(k, 1, "tile arrived")
        k.barrier("tile visible")
        new = list(sums)
        for kk in (0, 16):
            a = [fragments(tiles[0][0], stage, warp_row + 16 * i, kk) for i in range(2)]
            b = [fragments(tiles[1][0], stage, warp_col + 16 * j, kk) for j in range(2)]
            for i in range(2):
                for j in range(4):
                    pair = [b[j // 2][j % 2], b[j // 2][j % 2 + 2]]
                    at4 = 4 * (4 * i + j)
                    whole = k.call(
                        "{ float, float, float, float }",
                        "llvm.nvvm.mma.m16n8k16.row.col.bf16",
                        *a[i],
                        *pair,
                        *new[at4 : at4 + 4],
                    )
                    new[at4 : at4 + 4] = k.members(whole, 4, "float")
        k.barrier("tile read")
        return [k.const(1) - stage, *new]

    fetch(k.const(0), k.const(0))
    _, *sums = k.loop(k.const(0), depth, MMA_TILE_K, [k.const(0), *[k.const(0, "float")] * 32], step)
    _wait(k, 0, "nothing under way")
    for i in range(2):
        for j in range(4):
            for r in range(4):
                row = first_row + warp_row + 16 * i + 8 * (r // 2) + lane // 4
                col = first_col + warp_col + 8 * j + lane % 4 * 2 + r % 2
                value = sums[4 * (4 * i + j) + r]
                k.when(
                    (row < m) & (col < n),
                    lambda value=value, row=row, col=col: k.store(value, k.p["c"], row * n + col),
                )
    return k.text()


_WGMMA_ASM = (
    "{{\\0A.reg .pred p;\\0Asetp.ne.b32 p, ${scale_d}, 0;\\0A"
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{sums}}}, ${a}, ${b}, p, 1, 1, 0, 0;\\0A}}"
)


def _wgmma(k: Kernel, sums: list[Value], a: Value, b: Value) -> list[Value]:
    count = len(sums)
    body = _WGMMA_ASM.format(
        sums=", ".join(f"${i}" for i in range(count)), a=2 * count, b=2 * count + 1, scale_d=2 * count + 2
    )
    outs, ties = ",".join(["=f"] * count), ",".join(map(str, range(count)))
    result = "{ " + ", ".join(["float"] * count) + " }"
    args = ", ".join([*(value.typed for value in sums), a.typed, b.typed, "i32 1"])
    whole = k.value(f'call {result} asm sideeffect "{body}", "{outs},{ties},l,l,n"({args})', result)
    return k.members(whole, count, "float")


def gemm_wgmma() -> str:
    """The same by wgmma m64n64k16: 64 x 64 x 64 tiles, three stages of cp.async, both operands from swizzled tiles."""
    row_bytes = WGMMA_TILE_K * 2  # 128: one swizzle row
    stage_bytes = WGMMA_TILE * row_bytes
    k = Kernel("gemm_wgmma", GEMM_PARAMS, {"tiles": (0, 1024)})
    m, n, depth = k.p["m"], k.p["n"], k.p["k"]
    thread = k.sreg("tid.x")
    lane, warp = thread % 32, thread // 32
    first_row, first_col = k.sreg("ctaid.y") * WGMMA_TILE, k.sreg("ctaid.x") * WGMMA_TILE
    tiles = k.shared("tiles")
    parts = ((0, k.p["a"], first_row, m), (WGMMA_STAGES, k.p["b"], first_col, n))
    base = k.cast("ptrtoint", tiles, "i64")

    def fetch(stage: Value, at: Value) -> None:
        for first_stage, source, first, count in parts:
            for part in range(WGMMA_TILE * WGMMA_TILE_K // 8 // WGMMA_THREADS):
                row = thread // 8 + 16 * part
                piece = thread % 8
                swizzled = piece ^ (row % 8)  # swizzle
                offset = (stage + first_stage) * stage_bytes + row * row_bytes + swizzled * 16
                index = _rows(k, first, row, count) * depth + at + piece * 8
                _copy_async(k, tiles, offset, source, index, depth - at - piece * 8)
        _commit(k)

    def descriptor(stage: Value, first_stage: int, kk: int) -> Value:
        """128-byte swizzle, 1024 bytes from 8 rows to the next 8, start at column kk of a stage."""
        offset = k.cast("zext", (stage + first_stage) * stage_bytes + kk * 2, "i64")
        start = ((base + offset) >> 4) & 0x3FFF
        return start | ((1 << 62) | (1024 // 16 << 32) | (1 << 16))

    def step(at: Value, stage: Value, *sums: Value) -> list[Value]:
        _wait(k, WGMMA_STAGES - 2, "tile arrived")
        k.call("void", "llvm.nvvm.fence.proxy.async.shared_cta")
        k.barrier("tile visible")
        k.call("void", "llvm.nvvm.wgmma.fence.sync.aligned", tag="registers ready")
        new = list(sums)
        for kk in range(0, WGMMA_TILE_K, 16):
            new = _wgmma(k, new, descriptor(stage, 0, kk), descriptor(stage, WGMMA_STAGES, kk))
        k.call("void", "llvm.nvvm.wgmma.commit_group.sync.aligned")
        following = (stage + WGMMA_STAGES - 1) % WGMMA_STAGES
        k.call("void", "llvm.nvvm.wgmma.wait_group.sync.aligned", k.const(0, "i64"), tag="product done")
        # What is overwritten now was read in the round before: all warps waited for that ahead of the barrier above.
        fetch(following, at + (WGMMA_STAGES - 1) * WGMMA_TILE_K)
        return [(stage + 1) % WGMMA_STAGES, *new]

    for stage in range(WGMMA_STAGES - 1):
        fetch(k.const(stage), k.const(stage * WGMMA_TILE_K))
    carried = [k.const(0), *[k.const(0, "float")] * 32]
    _, *sums = k.loop(k.const(0), depth, WGMMA_TILE_K, carried, step)
    _wait(k, 0, "nothing under way")
    for i, value in enumerate(sums):
        row = first_row + warp * 16 + lane // 4 + 8 * (i % 4 // 2)
        col = first_col + 8 * (i // 4) + lane % 4 * 2 + i % 2
        k.when(
            (row < m) & (col < n),
            lambda value=value, row=row, col=col: k.store(value, k.p["c"], row * n + col),
        )
    return k.text()

"""StepExecutor and paged_attention from Python, with kernels that are Python functions behind C addresses."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nanoserve.native import LOGITS_BLOCK, KVCachePool, PageTable, StepExecutor, ThreadPool, paged_attention
from native.kernels_ctypes import Args, PythonKernel

VOCAB = 70
MAX_TOKENS = 32


def make(threads: int = 2, **options: int) -> tuple[KVCachePool, StepExecutor]:
    pool = KVCachePool(num_pages=32, page_size=4, num_layers=2, num_heads=2, head_dim=3)
    return pool, StepExecutor(pool, ThreadPool(threads), MAX_TOKENS, **options)


def sequence(pool: KVCachePool, tokens: int) -> PageTable:
    table = PageTable(pool)
    table.grow_to(tokens)
    return table


def nothing(args: Args) -> None:
    del args


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_small_model(threads: int) -> None:
    """Embedding, a weight, positions, slots and logits of chosen rows, in the order of the plan."""
    pool, executor = make(threads)
    table_weight = np.random.default_rng(1).standard_normal((VOCAB, 8), np.float32)
    stride, logits_stride = executor.stride(8), executor.logits_stride(VOCAB)
    assert (stride, logits_stride) == (80, 128)

    def embed(args: Args) -> None:
        ids, positions, slots = (args.array(i, (MAX_TOKENS,), np.int32) for i in range(3))
        table, x = args.array(3, (VOCAB, 8)), args.array(4, (MAX_TOKENS, stride))
        for row in range(args.begin, args.end):
            x[row, :8] = table[ids[row]]
            x[row, 8:10] = positions[row], slots[row]

    def head(args: Args) -> None:
        x, rows = args.array(0, (MAX_TOKENS, stride)), args.array(1, (3,), np.int32)
        table, logits = args.array(2, (VOCAB, 8)), args.array(3, (3, logits_stride))
        assert (args.integer(4), args.integer(5)) == (9, 3)
        for sample in range(args.begin, args.end):
            logits[sample, :VOCAB] = table @ x[rows[sample], :8]

    kernels = [PythonKernel(embed, 5), PythonKernel(head, 6)]
    buffer, weight = executor.buffer(8), executor.weight(table_weight)
    executor.op(
        "embed",
        kernels[0].address,
        [("ids",), ("positions",), ("slots",), ("weight", weight), ("buffer", buffer)],
        "rows",
    )
    head_args = [
        ("buffer", buffer),
        ("sample_rows",),
        ("weight", weight),
        ("logits",),
        ("num_rows",),
        ("num_samples",),
    ]
    executor.op("head", kernels[1].address, head_args, "samples")

    tables = [sequence(pool, 6), sequence(pool, 11)]
    ids = np.arange(9, dtype=np.int32) * 5
    logits, block_max = executor.forward(ids, tables, [0, 8], [6, 3], np.array([8, 0, 5], np.int32), VOCAB)
    assert [kernel.errors for kernel in kernels] == [[], []]
    assert sorted(kernels[0].ranges)[0][0] == 0
    assert sum(end - begin for begin, end in kernels[0].ranges) == 9
    assert len(kernels[0].ranges) == min(threads, 9)
    assert logits.shape == (3, VOCAB)
    assert logits.strides == (512, 4)
    assert logits.ctypes.data % 64 == 0
    assert block_max.dtype == np.float32
    assert block_max.tolist() == [[0.0]] * 3  # this plan computes none
    np.testing.assert_array_equal(logits, [table_weight @ table_weight[ids[row]] for row in (8, 0, 5)])
    view = executor.buffer_view(buffer)
    assert view.shape == (MAX_TOKENS, stride)
    assert view[:9, 8].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert view[:9, 9].tolist() == [*tables[0].slots(0, 6), *tables[1].slots(8, 3)]
    again, _ = executor.forward(ids, tables, [0, 8], [6, 3], [8, 0, 5], VOCAB)
    assert again.ctypes.data != logits.ctypes.data  # a caller may keep its logits
    np.testing.assert_array_equal(again, logits)


def test_a_plan_may_write_the_largest_of_each_block() -> None:
    """One number for each started block of the vocabulary, in an array of its own."""
    pool, executor = make()
    vocab = 2 * LOGITS_BLOCK + 1

    def largest(args: Args) -> None:
        args.array(0, (3, 3))[args.begin : args.end] = (
            np.arange(3) + 10 * np.arange(args.begin, args.end)[:, None]
        )

    kernel = PythonKernel(largest, 1)
    executor.op("block_max", kernel.address, [("block_max",)], "samples")
    logits, block_max = executor.forward([1, 2, 3], [sequence(pool, 3)], [0], [3], [0, 1, 2], vocab)
    assert kernel.errors == []
    assert block_max.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert not logits.any()


def test_a_plan_without_logits_gives_zeros() -> None:
    pool, executor = make()
    logits, block_max = executor.forward([1, 2], [sequence(pool, 2)], [0], [2], [1], VOCAB)
    assert logits.shape == (1, VOCAB)
    assert not logits.any()
    assert block_max.tolist() == [[0.0]]
    logits, block_max = executor.forward([1, 2], [sequence(pool, 2)], [0], [2], [], VOCAB)
    assert logits.shape == (0, VOCAB)
    assert block_max.shape == (0, 1)


def forward_cases() -> list[tuple[str, dict[str, object], type[Exception], str]]:
    return [
        (
            "id past the vocabulary",
            {"input_ids": [1, 2, 70]},
            ValueError,
            "token id 70 at position 6 of sequence 0",
        ),
        ("negative id", {"input_ids": [1, -2, 3]}, ValueError, r"token id -2 .* must be in \[0, 69\]"),
        ("huge id", {"input_ids": [1, 2, 2**40]}, ValueError, r"input_ids\[2\] is 1099511627776"),
        ("float ids", {"input_ids": [1.0, 2.0, 3.0]}, TypeError, "input_ids has dtype float64"),
        ("ids as a matrix", {"input_ids": [[1, 2, 3]]}, ValueError, r"input_ids has shape \[1, 3\]"),
        ("too few ids", {"input_ids": [1, 2]}, ValueError, "add up to 3 tokens, input_ids has 2"),
        ("count of zero", {"counts": [0]}, ValueError, "every count is 0, must be at least 1"),
        ("negative start", {"starts": [-1]}, ValueError, "every start is -1"),
        (
            "past the pages",
            {"starts": [6]},
            ValueError,
            "reaches 9 tokens, its pages hold 8: grow the table first",
        ),
        ("past the positions", {"starts": [5]}, ValueError, "reaches 8 tokens, the model has 7 positions"),
        (
            "sample row",
            {"sample_rows": [3]},
            IndexError,
            "sample row 3 is out of range: the step has rows 0 to 2",
        ),
        ("no vocabulary", {"vocab": 0}, ValueError, "vocab is 0"),
        ("two starts", {"starts": [0, 0]}, ValueError, "got 2 and 1"),
        (
            "past the positions by its offset",
            {"position_offsets": [1]},
            ValueError,
            "sequence 0 reaches 7 tokens at position offset 1, the model has 7 positions",
        ),
        ("negative offset", {"position_offsets": [-1]}, ValueError, "every position offset is -1"),
        ("huge offset", {"position_offsets": [2**31]}, ValueError, r"position_offsets\[0\] is 2147483648"),
        ("two offsets", {"position_offsets": [0, 0]}, ValueError, "as many position_offsets, got 2"),
        ("float offsets", {"position_offsets": [0.5]}, TypeError, "position_offsets has dtype float64"),
        ("no table", {"tables": []}, ValueError, "at least one sequence"),
        ("None as table", {"tables": [None]}, ValueError, "belongs to another pool"),
        ("pages as table", {"tables": [[0, 1]]}, RuntimeError, "Unable to cast"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "text"), [c[1:] for c in forward_cases()], ids=[c[0] for c in forward_cases()]
)
def test_forward_checks_everything(change: dict[str, object], error: type[Exception], text: str) -> None:
    pool, executor = make(max_positions=7)
    kernel = PythonKernel(nothing, 0)
    executor.op("op", kernel.address, [], "rows")
    table = sequence(pool, 8)
    good = {
        "input_ids": [1, 2, 3],
        "tables": [table],
        "starts": [4],
        "counts": [3],
        "sample_rows": [2],
        "vocab": VOCAB,
    }
    with pytest.raises(error, match=text):
        executor.forward(**(good | change))
    assert kernel.ranges == []
    executor.forward(**good)
    assert kernel.ranges != []


@pytest.mark.parametrize("make_offsets", [list, np.array, lambda values: np.array(values, np.int32)])
def test_position_offsets(make_offsets: Callable[[list[int]], object]) -> None:
    """Added to the positions kernels see, per sequence; slots are where they were."""
    pool, executor = make(max_positions=150)
    seen: list[list[list[int]]] = []

    def record(args: Args) -> None:
        seen.append([args.array(i, (5,), np.int32).tolist() for i in range(2)])

    kernel = PythonKernel(record, 2)
    executor.op("record", kernel.address, [("positions",), ("slots",)], "rows", cost_per_unit=1)
    batch = [1, 2, 3, 4, 5], [sequence(pool, 6), sequence(pool, 3)], [3, 1], [3, 2], [], VOCAB
    executor.forward(*batch)
    executor.forward(*batch, position_offsets=make_offsets([0, 100]))
    executor.forward(*batch, position_offsets=None)
    assert kernel.errors == []
    assert [positions for positions, _ in seen] == [[3, 4, 5, 1, 2], [3, 4, 5, 101, 102], [3, 4, 5, 1, 2]]
    assert seen[0][1] == seen[1][1] == seen[2][1]


def test_shared_pages_are_never_written() -> None:
    pool, executor = make()
    table = sequence(pool, 8)
    other = PageTable(pool)
    other.adopt(table.pages[:1])
    executor.forward([1], [table], [4], [1], [], VOCAB)  # the shared page is only read
    with pytest.raises(RuntimeError, match="sequence 0 would write page 0, which has 2 references"):
        executor.forward([1], [table], [3], [1], [], VOCAB)
    assert table.make_writable(0)
    executor.forward([1], [table], [3], [1], [], VOCAB)
    with pytest.raises(ValueError, match="listed twice"):
        executor.forward([1, 1], [table, table], [3, 4], [1, 1], [], VOCAB)
    with pytest.raises(ValueError, match="another pool"):
        executor.forward([1], [sequence(make()[0], 4)], [0], [1], [], VOCAB)


def test_plans_are_checked() -> None:
    pool, executor = make()
    kernel = PythonKernel(nothing, 0)
    cases = [
        ([("buffer", 0)], "rows", {}, IndexError, "buffer 0 is out of range"),
        ([("weight", 3)], "rows", {}, IndexError, "weight 3 is out of range"),
        ([("k", 2)], "rows", {}, IndexError, "layer 2 is out of range"),
        ([("ids", 1)], "rows", {}, ValueError, r"argument \('ids', 1\) must have 1 part"),
        ([("buffer",)], "rows", {}, ValueError, "must have 2 parts"),
        ([()], "rows", {}, ValueError, "an argument is a tuple"),
        ([("idz",)], "rows", {}, ValueError, "unknown argument source 'idz'"),
        ([], "columns", {}, ValueError, "unknown domain 'columns'"),
        ([], "tiles", {}, ValueError, "panels is 0"),
        ([], "tiles", {"panels": 2, "row_block": 4, "over": "tokens"}, ValueError, "over is 'tokens'"),
        ([], "rows", {"panels": 2}, ValueError, "for the domain tiles"),
        ([], "rows", {"cost_per_unit": -5}, ValueError, "cost_per_unit is -5"),
        ([("items",)], "rows", {}, ValueError, "asks for items"),
    ]
    for args, domain, options, error, text in cases:
        with pytest.raises(error, match=text):
            executor.op("op", kernel.address, args, domain, **options)
    with pytest.raises(ValueError, match="'op' has no kernel"):
        executor.op("op", 0, [], "rows")
    with pytest.raises(ValueError, match="5 KV heads, the pool has 2"):
        executor.attention("attention", kernel.address, (2, 1), kernel.address, (4, 1), [], 2, 5)
    with pytest.raises(ValueError, match="window is -3"):
        executor.attention("attention", kernel.address, (2, 1), kernel.address, (4, 1), [], 2, 2, window=-3)
    with pytest.raises(ValueError, match="C-contiguous"):
        executor.weight(np.zeros((4, 4), np.float32)[:, ::2])
    with pytest.raises(ValueError, match="is empty"):
        executor.weight(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="max_tokens is 0"):
        StepExecutor(pool, ThreadPool(1), 0)
    assert executor.timings() == []


def test_weights_live_as_long_as_the_plan() -> None:
    _, executor = make()
    array = np.ones(4, np.float32)
    alive = weakref.ref(array)
    executor.weight(array)
    del array
    gc.collect()
    assert alive() is not None
    del executor, _
    gc.collect()
    assert alive() is None


def test_the_lock_is_free_while_a_step_runs() -> None:
    """Another Python thread makes progress during forward, and a second forward is refused, not raced."""
    pool, executor = make()
    started, leave = threading.Event(), threading.Event()

    def wait(args: Args) -> None:
        del args
        started.set()
        assert leave.wait(20)

    kernel = PythonKernel(wait, 0)
    executor.op("wait", kernel.address, [], "rows")
    table, other = sequence(pool, 1), sequence(pool, 1)
    worker = threading.Thread(target=lambda: executor.forward([1], [table], [0], [1], [], VOCAB))
    worker.start()
    assert started.wait(20)
    with pytest.raises(RuntimeError, match="running a step already"):
        executor.forward([1], [other], [0], [1], [], VOCAB)
    with pytest.raises(RuntimeError, match="running a step"):
        executor.op("late", kernel.address, [], "rows")
    leave.set()
    worker.join(20)
    assert not worker.is_alive()
    assert kernel.errors == []
    executor.forward([1], [other], [0], [1], [], VOCAB)


def test_profile_measures_operations() -> None:
    pool, executor = make()
    kernel = PythonKernel(lambda args: time.sleep(0.002), 0)
    executor.op("sleep", kernel.address, [], "rows")
    table = sequence(pool, 1)
    executor.profile(True)
    for _ in range(3):
        executor.forward([1], [table], [0], [1], [], VOCAB)
    ((name, nanoseconds, calls),) = executor.timings()
    assert (name, calls) == ("sleep", 3)
    assert nanoseconds > 6_000_000


def test_threads_are_counted() -> None:
    assert ThreadPool().num_threads >= 1
    assert ThreadPool(3).num_threads == 3
    for count in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"num_threads is {count}"):
            ThreadPool(count)


# --- attention --------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM, PAGE = 6, 2, 3, 4
GROUP = HEADS // KV_HEADS


def attention_kernel(
    num_tokens: int, q_stride: int, num_items: int = 4096, table_len: int = 512
) -> PythonKernel:
    """Attention over items as plan.md defines them."""

    def body(args: Args) -> None:
        layer = args.array(1, (32, KV_HEADS, 2, DIM * PAGE))
        keys = layer[:, :, 0].reshape(32, KV_HEADS, DIM, PAGE)
        values = layer[:, :, 1].reshape(32, KV_HEADS, PAGE, DIM)
        assert args.array(2, (1,)).ctypes.data == layer[:, :, 1].ctypes.data
        q, out = args.array(0, (num_tokens, q_stride)), args.array(6, (num_tokens, q_stride))
        table = args.array(3, (table_len,), np.int32)
        items = args.array(4, (num_items, 16), np.int32)
        for item in range(args.begin, args.end):
            table_off, first_head, num_heads, q0, r0, num_rows, pos0, first, end, part, *_ = (
                int(x) for x in items[item]
            )
            assert (first, end, part) == (0, 1, -1)  # all of these are short
            for kv_head, r in product(range(first_head, first_head + num_heads), range(r0, r0 + num_rows)):
                row, position, head = q0 + r // GROUP, pos0 + r // GROUP, kv_head * GROUP + r % GROUP
                own = table[table_off : table_off + position // PAGE + 1]
                k = keys[own, kv_head].transpose(0, 2, 1).reshape(-1, DIM)[: position + 1]
                v = values[own, kv_head].reshape(-1, DIM)[: position + 1]
                scores = np.exp(k @ q[row, head * DIM : (head + 1) * DIM])
                out[row, head * DIM : (head + 1) * DIM] += (scores / scores.sum()) @ v

    return PythonKernel(body, 7)


def dense_attention(
    q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32], start: int
) -> list[object]:
    """The definition, for one sequence whose keys and values are [position, KV head, dim]."""
    rows = []
    for i, row in enumerate(q):
        seen = slice(0, start + i + 1)
        heads = []
        for head in range(HEADS):
            scores = np.exp(k[seen, head // GROUP].astype(np.float64) @ row[head])
            heads.append((scores / scores.sum()) @ v[seen, head // GROUP])
        rows.append(heads)
    return rows


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("through", ["executor", "paged_attention"])
def test_attention_matches_the_definition(threads: int, through: str) -> None:
    pool, executor = make(threads)
    random = np.random.default_rng(5)
    starts, counts = [0, 13, 5], [9, 1, 4]
    tables: list[PageTable] = [PageTable(pool) for _ in counts]
    for tokens in range(0, 20, PAGE):  # in turns, so that no sequence has a run of pages
        for table, start, count in zip(reversed(tables), reversed(starts), reversed(counts), strict=True):
            table.grow_to(min(tokens, start + count))
    wants: list[object] = []
    q = random.standard_normal((14, HEADS, DIM)).astype(np.float32)
    for s, (start, count) in enumerate(zip(starts, counts, strict=True)):
        k, v = random.standard_normal((2, start + count, KV_HEADS, DIM)).astype(np.float32)
        pool.store_kv(k, v, tables[s].slots(0, start + count), 1)
        first = sum(counts[:s])
        wants += dense_attention(q[first : first + count], k, v, start)

    if through == "executor":
        stride = executor.stride(HEADS * DIM)
        kernels = [attention_kernel(MAX_TOKENS, stride), attention_kernel(MAX_TOKENS, stride)]
        q_buffer, out_buffer = executor.buffer(HEADS * DIM), executor.buffer(HEADS * DIM)
        executor.buffer_view(q_buffer)[:14, : HEADS * DIM] = q.reshape(14, -1)
        args = [
            ("buffer", q_buffer),
            ("k", 1),
            ("v", 1),
            ("table",),
            ("items",),
            ("parts",),
            ("buffer", out_buffer),
        ]
        executor.attention(
            "attention", kernels[0].address, (3, 2), kernels[1].address, (8, 1), args, GROUP, KV_HEADS
        )
        for _ in range(2):  # the second step must start from the first item again
            executor.buffer_view(out_buffer)[:] = 0
            executor.forward(np.ones(14, np.int32), tables, starts, counts, [], VOCAB)
        out = executor.buffer_view(out_buffer)[:14, : HEADS * DIM].reshape(14, HEADS, DIM)
    else:
        kernels = [attention_kernel(14, HEADS * DIM), attention_kernel(14, HEADS * DIM)]
        block_tables = np.full((3, 6), -1, np.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table.pages
        out = np.zeros_like(q)
        paged_attention(
            pool,
            1,
            q,
            out,
            block_tables,
            starts,
            counts,
            kernels[0].address,
            (3, 2),
            kernels[1].address,
            (8, 1),
            ThreadPool(threads),
        )
    assert [kernel.errors for kernel in kernels] == [[], []]
    assert all(kernel.ranges for kernel in kernels)  # decode and chunks were told apart
    np.testing.assert_allclose(out, wants, atol=2e-6)


def attention_cases() -> list[tuple[str, dict[str, object], type[Exception], str]]:
    q = np.zeros((3, HEADS, DIM), np.float32)
    read_only = np.zeros((3, HEADS, DIM), np.float32)
    read_only.flags.writeable = False
    return [
        ("q dtype", {"q": q.astype(np.float64)}, TypeError, "q must be a C-contiguous float32"),
        (
            "out strided",
            {"out": np.zeros((3, HEADS, 2 * DIM), np.float32)[:, :, ::2]},
            TypeError,
            "out must be",
        ),
        ("out read-only", {"out": read_only}, ValueError, "not writeable"),
        ("out shape", {"out": np.zeros((4, HEADS, DIM), np.float32)}, ValueError, r"but out has \[4, 6, 3\]"),
        ("head dim", {"q": np.zeros((3, HEADS, 4), np.float32)}, ValueError, r"must be \[tokens, heads, 3\]"),
        ("heads", {"q": q[:, :5].copy(), "out": q[:, :5].copy()}, ValueError, "5 query heads cannot share"),
        ("table dtype", {"block_tables": np.zeros((2, 2), np.int64)}, TypeError, "C-contiguous int32"),
        ("table rows", {"block_tables": np.zeros((1, 2), np.int32)}, ValueError, "there are 2 starts"),
        (
            "page",
            {"block_tables": np.array([[0, 1], [32, 0]], np.int32)},
            ValueError,
            "a page of sequence 1 is 32",
        ),
        ("counts", {"counts": [2, 2]}, ValueError, "add up to 4 tokens, q has 3"),
        ("start", {"starts": [7, 0]}, ValueError, "which needs 3 pages: block_tables has 2"),
        ("layer", {"layer": 9}, IndexError, "layer 9"),
        ("rows", {"small_tiling": (0, 1)}, ValueError, "small rows is 0"),
        ("address", {"large_address": 0}, ValueError, "address is 0"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "text"), [c[1:] for c in attention_cases()], ids=[c[0] for c in attention_cases()]
)
def test_paged_attention_checks_everything(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    pool, _ = make()
    kernel = PythonKernel(nothing, 7)
    good = {
        "pool": pool,
        "layer": 0,
        "q": np.zeros((3, HEADS, DIM), np.float32),
        "out": np.zeros((3, HEADS, DIM), np.float32),
        "block_tables": np.array([[0, 1], [2, -1]], np.int32),
        "starts": [3, 0],
        "counts": [2, 1],
        "small_address": kernel.address,
        "small_tiling": (3, 2),
        "large_address": kernel.address,
        "large_tiling": (6, 1),
        "threads": ThreadPool(1),
    }
    paged_attention(**good)
    calls = len(kernel.ranges)
    with pytest.raises(error, match=text):
        paged_attention(**(good | change))
    assert len(kernel.ranges) == calls


# --- the stub file ----------------------------------------------------------------------------------------------------


def test_the_stub_names_what_the_module_has() -> None:
    """python/nanoserve/_ch16.pyi is written by hand; this is what keeps it true."""
    import ast

    from nanoserve import native

    stub = Path(__file__).resolve().parents[2] / "python" / "nanoserve" / "_ch16.pyi"
    module = native._module
    body = ast.parse(stub.read_text()).body
    declared = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    constants = {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}
    assert set(declared) | constants == {name for name in vars(module) if not name.startswith("_")}
    for name, node in declared.items():
        if not isinstance(node, ast.ClassDef) or issubclass(getattr(module, name), Exception):
            continue
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        cls = getattr(module, name)
        actual = {member for member in vars(cls) if not member.startswith("_")} | {"__init__"}
        numbers = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
        told = {member for member in methods if not member.startswith("__") or member == "__init__"}
        assert told | numbers == actual, name
        for member, function in methods.items():
            doc = getattr(cls, member).__doc__ or ""
            for argument in function.args.args[1:]:
                if not member.startswith("__") or member == "__init__":
                    assert f"{argument.arg}:" in doc, (
                        f"{name}.{member}: the module has no argument {argument.arg}"
                    )

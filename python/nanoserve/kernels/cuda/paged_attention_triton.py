"""Attention over pages, in Triton: the rows of a span (consecutive positions of one sequence) against all keys before them.

    attend   a program has a tile of rows of one KV head: rows x the query heads that share it. It walks the keys in blocks of
             BLOCK and merges what each segment of SEGMENT keys gave, in order.
    split    the same for one row of a sequence and one segment, a piece, so that few long sequences fill a device: leaves its
             sums for
    merge    which adds a sequence's pieces up, in the same order and with the same operations.

Bits: blocks and segments begin at absolute positions, so a row's sums are the same sums whoever computes them: alone or among
others, in a chunk or as the last token, in one program or in many. What a row does not see contributes exactly nothing. Sums
over a block are all matrix products, the sum of the weights too (times a column of ones): their order belongs to the
instruction, while that of tl.sum belongs to how a tile is spread over threads. Products and sums are fused only where fma says
so (`enable_fp_fusion=False`), or each kernel could be fused differently.

Layouts: queries float32 [rows][ld_q], head after head; keys and values [page][kv_head][slot][dim]; spans int32 [n][4], pieces
[n][4] and decodes [n][3] as src/cuda_inputs.h's AttentionSpan, Piece and Decode; the flat block table as src/attention_work.h's. Source of the online softmax: Milakov and
Gimelshein, "Online normalizer calculation for softmax" (2018); of splitting keys: "Flash-Decoding" (Dao et al., 2023).
"""

# Triton reads the source of what is decorated: no annotations from __future__, and names as Triton has them.
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp2(x, largest):
    """2^(x - largest), 0 where nothing was seen yet."""
    return tl.where(x == float("-inf"), 0.0, tl.exp2(x - tl.where(largest == float("-inf"), 0.0, largest)))


@triton.jit
def _merged(m, total, acc, m_more, total_more, acc_more):
    """Two partial softmaxes as one. fma says which product is rounded: it must be the same everywhere."""
    largest = tl.maximum(m, m_more)
    a, b = _exp2(m, largest), _exp2(m_more, largest)
    total = tl.fma(total_more, b, total * a)
    a, b = tl.broadcast_to(a[:, None], acc.shape), tl.broadcast_to(b[:, None], acc.shape)
    return largest, total, tl.fma(acc_more, b, acc * a)


@triton.jit
def _segment(
    q, positions, keys, K, V, table, kv_head, first, last,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Blocks [first, last) of a sequence's `keys`: the largest score, the sum, and the weighted values, of each row."""
    ROWS: tl.constexpr = q.shape[0]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS, 16], tl.float32)  # all columns the same: no product is narrower
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    dims = tl.arange(0, DIM_PAD)
    for block in range(first, last):
        key = block * BLOCK + tl.arange(0, BLOCK)
        page = tl.load(table + key // PAGE).to(tl.int64)
        at = ((page * KV_HEADS + kv_head) * PAGE + key % PAGE) * DIM
        inside = (dims < DIM)[None, :]
        k = tl.load(K + at[:, None] + dims[None, :], mask=inside, other=0.0)
        if NARROW:
            score = tl.dot(q, tl.trans(k))
        else:
            score = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee")
        score = score * SCALE
        if SOFTCAP > 0.0:
            # tanh(x) = 1 - 2 / (1 + e^2x)
            score = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2_E / SOFTCAP))))
        score = score * LOG2_E
        seen = key[None, :] <= positions[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > positions[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        largest = tl.maximum(m, tl.max(score, 1))
        p = _exp2(score, tl.broadcast_to(largest[:, None], score.shape))
        a = _exp2(m, largest)
        sums = sums * tl.broadcast_to(a[:, None], sums.shape)
        acc = acc * tl.broadcast_to(a[:, None], acc.shape)
        # A page's unused slots may hold anything, and 0 * inf is not 0.
        v = tl.load(V + at[:, None] + dims[None, :], mask=inside & (key < keys)[:, None], other=0.0)
        if NARROW:
            sums = tl.dot(p.to(tl.bfloat16), tl.full([BLOCK, 16], 1.0, tl.bfloat16), sums)
            acc = tl.dot(p.to(tl.bfloat16), v, acc)
        else:
            sums = tl.dot(p, tl.full([BLOCK, 16], 1.0, tl.float32), sums, input_precision="ieee")
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")
        m = largest
    return m, tl.max(sums, 1), acc


@triton.jit
def _rows(
    record, count, kv_head,
    ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A tile of `count` rows from the record's first on: its rows of the step and their heads, and which of it count.

    Volatile: asked for again behind the products, all is read and computed again (the minimum, which is 0, is there to make it
    so). What was kept would take registers from them.
    """
    first_row = tl.load(record, volatile=NARROW)
    index = tl.arange(0, ROWS) + tl.minimum(first_row, 0)
    valid = (index // GROUP < count)[:, None] & (tl.arange(0, DIM_PAD) < DIM)[None, :]
    return (first_row + index // GROUP).to(tl.int64), kv_head * GROUP + index % GROUP, valid


@triton.jit
def _queries(
    Q, record, count, start, kv_head,
    LD_Q: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A tile: its queries, and their positions, of which the first is `start` (-1: none)."""
    row, head, valid = _rows(record, count, kv_head, ROWS, GROUP, DIM, DIM_PAD, NARROW)
    index = tl.arange(0, ROWS) // GROUP
    q = tl.load(
        Q + (row * LD_Q + head * DIM)[:, None] + tl.arange(0, DIM_PAD)[None, :], mask=valid, other=0.0
    )
    if NARROW:
        q = q.to(tl.bfloat16)
    return q, tl.where(index < count, start + index, -1)


@triton.jit
def attend(
    Q, K, V, table, spans, out, num_spans,
    LD_Q: tl.constexpr, LD_OUT: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Grid: spans, KV heads. A span has at most ROWS // GROUP rows."""
    kv_head = tl.program_id(1)
    span = spans + 4 * tl.program_id(0)
    count, start, table_off = tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    keys = start + count
    q, positions = _queries(Q, span, count, start, kv_head, LD_Q, ROWS, GROUP, DIM, DIM_PAD, NARROW)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    begin = 0
    if WINDOW > 0:  # the first row's first key, at the begin of its segment
        begin = tl.maximum(start - WINDOW + 1, 0) // SEGMENT * SEGMENT
    for segment in range(begin, keys, SEGMENT):
        last = tl.minimum(tl.cdiv(keys, BLOCK), (segment + SEGMENT) // BLOCK)
        more = _segment(
            q, positions, keys, K, V, table + table_off, kv_head, segment // BLOCK, last,
            SCALE, SOFTCAP, WINDOW, KV_HEADS, DIM, DIM_PAD, PAGE, BLOCK, NARROW,
        )  # fmt: skip
        m, total, acc = _merged(m, total, acc, more[0], more[1], more[2])
    again = tl.load(span + 1, volatile=NARROW)
    row, head, valid = _rows(span, again, kv_head, ROWS, GROUP, DIM, DIM_PAD, NARROW)
    dims = tl.arange(0, DIM_PAD)
    result = acc / tl.broadcast_to(tl.where(total > 0.0, total, 1.0)[:, None], acc.shape)
    tl.store(
        out + (row * LD_OUT + head * DIM)[:, None] + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=valid,
    )


@triton.jit
def split(
    Q, K, V, table, pieces, parts, sums, num_pieces,
    LD_Q: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Grid: pieces, KV heads. parts [piece][head][DIM], sums the same with (largest, sum)."""
    kv_head = tl.program_id(1)
    piece = pieces + 4 * tl.program_id(0)
    segment, position = tl.load(piece + 1), tl.load(piece + 2)
    is_seen = segment >= 0  # no padding
    if WINDOW > 0:
        is_seen = is_seen & ((segment + 1) * SEGMENT > position + 1 - WINDOW)
    if is_seen:
        keys = position + 1
        table_off = tl.load(piece + 3)
        q, positions = _queries(Q, piece, 1, position, kv_head, LD_Q, ROWS, GROUP, DIM, DIM_PAD, NARROW)
        last = tl.minimum(tl.cdiv(keys, BLOCK), (segment + 1) * (SEGMENT // BLOCK))
        m, total, acc = _segment(
            q, positions, keys, K, V, table + table_off, kv_head, segment * (SEGMENT // BLOCK), last,
            SCALE, SOFTCAP, WINDOW, KV_HEADS, DIM, DIM_PAD, PAGE, BLOCK, NARROW,
        )  # fmt: skip
        _row, head, valid = _rows(piece, 1, kv_head, ROWS, GROUP, DIM, DIM_PAD, NARROW)
        at = tl.program_id(0).to(tl.int64) * (KV_HEADS * GROUP) + head
        dims = tl.arange(0, DIM_PAD)
        tl.store(parts + at[:, None] * DIM + dims[None, :], acc, mask=valid)
        tl.store(sums + 2 * at, m, mask=positions >= 0)
        tl.store(sums + 2 * at + 1, total, mask=positions >= 0)


@triton.jit
def merge(
    parts, sums, decodes, out, num_decodes,
    LD_OUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Grid: decodes, heads."""
    decode, head = decodes + 3 * tl.program_id(0), tl.program_id(1)
    first_row, keys, first_piece = tl.load(decode), tl.load(decode + 1), tl.load(decode + 2)
    if keys > 0:
        first = 0
        if WINDOW > 0:
            first = tl.maximum(keys - WINDOW, 0) // SEGMENT
        dims = tl.arange(0, DIM_PAD)
        m = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, DIM_PAD], tl.float32)
        for segment in range(first, tl.cdiv(keys, SEGMENT)):
            at = (first_piece + segment).to(tl.int64) * HEADS + head
            more = tl.load(parts + at * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
            m_more = tl.load(sums + 2 * at + tl.zeros([1], tl.int32))
            total_more = tl.load(sums + 2 * at + 1 + tl.zeros([1], tl.int32))
            m, total, acc = _merged(m, total, acc, m_more, total_more, more)
        result = acc / tl.broadcast_to(tl.where(total > 0.0, total, 1.0)[:, None], acc.shape)
        place = out + first_row.to(tl.int64) * LD_OUT + head * DIM + dims[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=(dims < DIM)[None, :])

"""Decode attention over latents on the CPU: one query per sequence, all heads over the same pages, read once.

With the up-projections absorbed (`moegen.ops.latent_heads`) latent attention is attention of H query heads over one key
per token, [latent, rotary part], whose first `rank` elements are the value too. So per element of a page there are
about 2 H multiply-adds, and arithmetic binds, not memory: these are two GEMMs with an online softmax between them,

    scores [heads, tokens]  = queries [heads, width] x keys [width, tokens]
    answer [heads, rank]   += weights [heads, tokens] x keys [tokens, rank]

DEPTH tokens at a time, their page in the second-level cache for both. A task is a block of heads over one piece of a
sequence. As in `moegen.ops.decode_kernel`, whose panels, pieces and prefetching these are: pages are float32 or
bfloat16, arithmetic is float32, threads take tasks from one counter, pieces are cut by the sequence's own length and
merged in order, so neither the number of threads nor the rest of the batch changes a bit of the result.

Shape suffixes: S spans, H heads, W width of a key, R rank, P pages, C tokens per page, N pieces, B blocks of heads.
Addresses and offsets are in bytes, strides in elements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from moegen.ops.decode_kernel import PIECE_TOKENS, cut, flip
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import numba_threads
from moegen.ops.vector_ir import as_floats, i64, nbytes, store
from moegen.ops.vectors import (
    BLOCK,
    DEPTH,
    LANES,
    MAX_ROWS,
    SOFT_ROWS,
    X_STRIDE,
    clear,
    get,
    get_float,
    product,
    put,
    scale,
    soften,
    take_number,
    widen,
)
from moegen.schedule.step import DecodeSpans

if TYPE_CHECKING:
    from moegen.ops.attention import AttentionRule

_BLOCK_HEADS = 8 * MAX_ROWS  # that one task works on: their queries and answers share a core's second-level cache
_FLOAT = 4  # bytes
_TABLE_ENTRIES = (DEPTH + 3 + 7) // 8 * 8  # addresses that a thread keeps, up to whole cache lines

lock_kernel_cache()
_jit = numba.njit(error_model="numpy")


class _Shape(NamedTuple):
    heads: int  # of the block
    tile: int  # of these that a product takes at once
    page_tokens: int
    width: int
    rank: int
    size: int  # bytes of an element of a page
    out_stride: int  # rank, up to whole blocks


class _Scratch(NamedTuple):
    """Addresses of what one thread works in, float32 but for the table."""

    own: int  # [width / DEPTH, heads, X_STRIDE] queries
    flipped: int  # [width, BLOCK] keys
    panel: int  # [DEPTH, BLOCK] values
    scores: int  # [heads, X_STRIDE] of DEPTH tokens
    shrink: int  # [heads] factors of what was summed before
    table: int  # [DEPTH + 1] addresses of keys, page by page
    panels: int  # [2] addresses of what is multiplied, and of what is prefetched


class _Piece(NamedTuple):
    """Pages `first` to `end` of a sequence, which its query sees from token `low` to before `high`."""

    first: int
    end: int
    low: int
    high: int


class _State(NamedTuple):
    """Addresses of a task's softmax state: running maximum and sum `[heads]`, weighted values `[heads, out_stride]`."""

    best: int
    total: int
    acc: int


def latent_decode(
    query_SHW: torch.Tensor, keys_P1CW: torch.Tensor, spans: DecodeSpans, rule: AttentionRule, out_SHR: torch.Tensor
) -> None:
    """Writes the attention of each span's absorbed query into its row of `out_SHR`.

    Of scaling and window alone: no family gives latent attention sinks or a soft cap, and the seam refuses them.
    """
    heads, rank, page_tokens = query_SHW.shape[1], out_SHR.shape[2], keys_P1CW.shape[2]
    begins, first_pieces = cut(spans, rule, page_tokens)
    blocks = -(-heads // _BLOCK_HEADS)
    tasks, block_heads = first_pieces[-1] * blocks, -(-heads // blocks)
    own_SHR = torch.empty(len(spans.rows), heads, rank)
    pages = keys_P1CW.view(torch.uint16) if keys_P1CW.dtype == torch.bfloat16 else keys_P1CW
    with numba_threads() as threads:
        _decode(
            threads,
            query_SHW.float().contiguous().numpy(),
            pages.numpy(),
            spans.rows,
            begins,
            spans.kv_lengths,
            spans.page_starts,
            spans.page_ids,
            first_pieces,
            np.repeat(np.arange(len(spans.rows)), np.diff(first_pieces)),
            np.float32(rule.scaling),
            np.zeros(1 + len(spans.rows) * blocks, np.int64),
            torch.empty(2, tasks, block_heads).numpy(),
            torch.empty(tasks, block_heads, -(-rank // BLOCK) * BLOCK).numpy(),
            own_SHR.numpy(),
        )
    out_SHR[torch.from_numpy(spans.rows)] = own_SHR.to(out_SHR.dtype)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _decode(  # type: ignore[no-untyped-def]
    threads, query, pages, rows, begins, ends, page_starts, page_ids, first_pieces, piece_spans, scaling, counters,
    states, accs, out,
):  # fmt: skip
    for _ in numba.prange(threads):
        _work(
            query, pages, rows, begins, ends, page_starts, page_ids, first_pieces, piece_spans, scaling, counters,
            states, accs, out,
        )  # fmt: skip


@_jit
def _work(  # type: ignore[no-untyped-def]
    query, pages, rows, begins, ends, page_starts, page_ids, first_pieces, piece_spans, scaling, counters, states,
    accs, out,
):  # fmt: skip
    """Takes tasks until none is left; whoever ends the last piece of a span's block of heads merges them."""
    page_tokens, width = pages.shape[2:]
    block_heads, all_heads = accs.shape[1], query.shape[1]
    blocks = (all_heads + block_heads - 1) // block_heads
    depths = (width + DEPTH - 1) // DEPTH
    floats = np.zeros(
        16 + 2 * _TABLE_ENTRIES + (width + DEPTH) * BLOCK + (depths + 1) * block_heads * X_STRIDE + block_heads,
        np.float32,
    )
    table = (floats.ctypes.data + 63) // 64 * 64  # vectors that straddle cache lines cost twice
    flipped = table + 8 * _TABLE_ENTRIES
    panel = flipped + width * BLOCK * _FLOAT
    scores = panel + DEPTH * BLOCK * _FLOAT
    own = scores + block_heads * X_STRIDE * _FLOAT
    shrink = own + depths * block_heads * X_STRIDE * _FLOAT
    scratch = _Scratch(own, flipped, panel, scores, shrink, table, table + 8 * (DEPTH + 1))
    piece_pages = max(PIECE_TOKENS // page_tokens, 1)
    while True:
        task = take_number(counters.ctypes.data)
        if task >= accs.shape[0]:
            break
        number, block = task // blocks, task % blocks
        span, head = piece_spans[number], block * block_heads
        heads = min(block_heads, all_heads - head)
        tiles = (heads + MAX_ROWS - 1) // MAX_ROWS
        shape = _Shape(
            heads, (heads + tiles - 1) // tiles, page_tokens, width, out.shape[2], pages.itemsize, accs.shape[2]
        )
        low, high = begins[span], ends[span]
        first = low // page_tokens + (number - first_pieces[span]) * piece_pages
        end = min(first + piece_pages, (high + page_tokens - 1) // page_tokens)
        states[0, task, :] = -np.inf
        states[1, task, :] = 0
        for d in range(0, width, DEPTH):
            for r in range(heads):
                place = (own - floats.ctypes.data) // _FLOAT + (d // DEPTH * heads + r) * X_STRIDE
                source = query[rows[span], head + r, d : min(d + DEPTH, width)]
                to = floats[place : place + len(source)]
                for i in range(len(source)):
                    to[i] = source[i] * scaling
        _attend(
            pages.dtype.type(0),
            shape,
            scratch,
            _Piece(first, end, low, high),
            pages.ctypes.data,
            page_ids[page_starts[span] :],
            _State(
                states.ctypes.data + task * block_heads * _FLOAT,
                states.ctypes.data + (accs.shape[0] + task) * block_heads * _FLOAT,
                accs.ctypes.data + task * block_heads * shape.out_stride * _FLOAT,
            ),
        )
        ended = take_number(counters.ctypes.data + 8 * (1 + span * blocks + block)) + 1
        if ended == first_pieces[span + 1] - first_pieces[span]:
            some = slice(first_pieces[span] * blocks + block, first_pieces[span + 1] * blocks, blocks)
            for r in range(heads):
                _merge(states[0, some, r], states[1, some, r], accs[some, r], out[span, head + r])


@_jit
def _merge(best_N, total_N, acc_NR, out_R):  # type: ignore[no-untyped-def]
    """One head's answer, from the softmax states of its pieces."""
    top = best_N[0]
    for n in range(1, len(best_N)):
        top = max(top, best_N[n])
    sum_ = np.float32(0)
    out_R[:] = 0
    for n in range(len(best_N)):
        factor = np.float32(math.exp(best_N[n] - top))
        sum_ += factor * total_N[n]
        for d in range(len(out_R)):
            out_R[d] += factor * acc_NR[n, d]
    for d in range(len(out_R)):
        out_R[d] /= sum_


@_jit
def _attend(kind, shape, scratch, piece, pages, page_ids, state):  # type: ignore[no-untyped-def]
    """The softmax state of a block of heads after a piece; `pages` is where page 0 lies."""
    page_tokens, page_bytes = shape.page_tokens, shape.page_tokens * shape.width * shape.size
    together = page_tokens % BLOCK == 0 and DEPTH % page_tokens == 0  # whole pages fill DEPTH tokens
    last = piece.end - 1
    clear(state.acc, shape.heads * shape.out_stride // LANES)
    start, end = piece.first * page_tokens, min(piece.high, piece.end * page_tokens)
    if not together:  # nothing is softened before there is a token to see
        start += max(piece.low - start, 0) // BLOCK * BLOCK
    while start < end:
        stop = min(start + DEPTH, end)
        if not together:
            stop = min(stop, start - start % page_tokens + page_tokens)
        for token in range(start, stop, BLOCK):
            page, slot = token // page_tokens, token % page_tokens * shape.width * shape.size
            key = pages + page_ids[page] * page_bytes + slot
            ahead = pages + page_ids[min(page + 1, last)] * page_bytes + slot
            _score(kind, shape, scratch, key, min(stop - token, BLOCK), token - start, ahead)
        _soften(shape, scratch, piece.low - start, stop - start, state)
        rows = min(page_tokens, DEPTH)
        slot = start % page_tokens * shape.width * shape.size
        for n in range((stop - start + rows - 1) // rows + 1):
            page = page_ids[min(start // page_tokens + n, last)]
            put(scratch.table + n * 8, pages + page * page_bytes + slot)
        _add_values(kind, shape, scratch, stop - start, rows, state.acc)
        start = stop


@_jit
def _score(kind, shape, scratch, key, tokens, column, ahead):  # type: ignore[no-untyped-def]
    """`scores[r, column + c] = own[r] . key[c]` for at most BLOCK tokens c; prefetches as many keys at `ahead`."""
    flip(kind, shape.width, shape.size, key, tokens, scratch.flipped)
    for d in range(0, shape.width, DEPTH):
        depth = min(DEPTH, shape.width - d)
        put(scratch.panels, scratch.flipped + d * BLOCK * _FLOAT)
        put(scratch.panels + 8, ahead + d * BLOCK * shape.size)
        for r in range(0, shape.heads, shape.tile):
            product(
                np.float32(0), kind, d == 0, min(shape.tile, shape.heads - r), depth,
                scratch.own + (d // DEPTH * shape.heads + r) * X_STRIDE * _FLOAT,
                scratch.panels, depth, 0, BLOCK, scratch.panels + 8, 0, BLOCK * shape.size,
                scratch.scores + (r * X_STRIDE + column) * _FLOAT, X_STRIDE,
            )  # fmt: skip


@_jit
def _soften(shape, scratch, low, tokens, state):  # type: ignore[no-untyped-def]
    """Scores of `tokens` columns become weights; what was summed before shrinks to the new maximum."""
    vectors = (tokens + BLOCK - 1) // BLOCK * 2
    for r in range(0, shape.heads, SOFT_ROWS):
        soften(
            min(SOFT_ROWS, shape.heads - r), scratch.scores + r * X_STRIDE * _FLOAT, vectors, low, tokens,
            state.best + r * _FLOAT, state.total + r * _FLOAT, scratch.shrink + r * _FLOAT,
        )  # fmt: skip
    for r in range(shape.heads):
        shrink = scratch.shrink + r * _FLOAT
        if get_float(shrink) != 1:
            scale(state.acc + r * shape.out_stride * _FLOAT, shape.out_stride // LANES, shrink)


@intrinsic
def widen_block(typing, kind, source, to):  # type: ignore[no-untyped-def]
    """Copies BLOCK elements at `source` to `to`, as float32."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        for vector in range(BLOCK // LANES):
            place = b.add(args[1], i64(vector * LANES * nbytes(kind)))
            store(b, as_floats(b, place, kind), b.add(args[2], i64(vector * LANES * _FLOAT)))
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp), generate


@_jit
def _add_values(kind, shape, scratch, tokens, panel_rows, acc):  # type: ignore[no-untyped-def]
    """`acc[r] += sum over c < tokens of weights[r, c] * key[c, :rank]`, for the keys at the addresses in the table.

    A panel of values is widened once for all heads.
    """
    put(scratch.panels, scratch.panel)  # where it is also prefetched: it is there
    for d in range(0, shape.rank, BLOCK):
        columns = min(BLOCK, shape.rank - d)
        for c in range(tokens):
            key = get(scratch.table + c // panel_rows * 8) + (c % panel_rows * shape.width + d) * shape.size
            if columns == BLOCK:
                widen_block(kind, key, scratch.panel + c * BLOCK * _FLOAT)
            else:
                for i in range(columns):
                    widen(kind, key + i * shape.size, scratch.panel + (c * BLOCK + i) * _FLOAT)
        for r in range(0, shape.heads, shape.tile):
            product(
                np.float32(0), kind, 0, min(shape.tile, shape.heads - r), tokens,
                scratch.scores + r * X_STRIDE * _FLOAT, scratch.panels, tokens, 0, BLOCK, scratch.panels, 0, 0,
                acc + (r * shape.out_stride + d) * _FLOAT, shape.out_stride,
            )  # fmt: skip

"""Decode attention on the CPU: one query per sequence, keys and values read once, in place, page by page.

Compiled with Numba at first use (and cached on disk), so that installing needs no compiler. Pages are float32 or
bfloat16; arithmetic is float32. A task is one KV head over one piece of a sequence: all R query heads of the group meet
a page while it is in cache. Both products are a few rows times a panel BLOCK columns wide: queries times a page's
keys (transposed into a scratch panel), weights times its values. The softmax subtracts the running maximum (Milakov &
Gimelshein 2018, "Online normalizer calculation for softmax"). While one page is worked on, the next is prefetched.

Threads take tasks from one counter, so a ragged batch is balanced. Pieces are cut by the sequence's own length and
merged in order: neither the number of threads nor the rest of the batch changes a bit of the result.

Shape suffixes: S spans, T tokens, H query heads, G KV heads, R = H / G, P pages, C tokens per page, D dim, N pieces.
Addresses and offsets are in bytes, strides in elements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import numba_threads
from moegen.ops.vectors import (
    BLOCK,
    DEPTH,
    LANES,
    MAX_ROWS,
    X_STRIDE,
    clear,
    get,
    product,
    put,
    scale,
    softcap,
    soften,
    take_number,
    transpose,
    widen,
)
from moegen.schedule.step import DecodeSpans, Ints

if TYPE_CHECKING:
    from moegen.ops.attention import AttentionRule

KV_DTYPES = (torch.float32, torch.bfloat16)  # of the pages that the kernel reads
_PIECE_TOKENS = 1024  # a longer sequence is cut, so that a few long ones keep every core busy
_FLOAT = 4  # bytes

lock_kernel_cache()
_jit = numba.njit(error_model="numpy")


class _Shape(NamedTuple):
    groups: int  # KV heads
    repeat: int  # query heads per KV head
    tile: int  # of these that a product takes at once
    page_tokens: int
    key_dim: int
    value_dim: int
    size: int  # bytes of an element of a page
    out_stride: int  # value_dim, up to whole blocks


class _Scratch(NamedTuple):
    """Addresses of what one thread works in, float32 but for the table."""

    own: int  # [key_dim / DEPTH, R, X_STRIDE] queries
    flipped: int  # [key_dim, BLOCK] keys
    rest: int  # [DEPTH, BLOCK] the last columns of values
    scores: int  # [R, X_STRIDE] of DEPTH tokens
    table: int  # [DEPTH + 1] addresses of panels


class _Piece(NamedTuple):
    """Pages `first` to `end` of a sequence, which its query sees from token `low` to before `high`."""

    first: int
    end: int
    low: int
    high: int


class _State(NamedTuple):
    """Addresses of the softmax state of one task: running maximum and sum `[R]`, weighted values `[R, out_stride]`."""

    best: int
    total: int
    acc: int


def kernel_reads(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the kernel can serve these tensors; otherwise the torch way does."""
    return query.device.type == "cpu" and keys.device.type == "cpu" and keys.dtype in KV_DTYPES


def decode_attention(
    query_THD: torch.Tensor,
    keys_PGCD: torch.Tensor,
    values_PGCD: torch.Tensor,
    spans: DecodeSpans,
    rule: AttentionRule,
    out_THD: torch.Tensor,
) -> None:
    """Writes the attention of each span's query into its row of `out_THD`."""
    heads, groups, value_dim = query_THD.shape[1], keys_PGCD.shape[1], values_PGCD.shape[3]
    begins = np.maximum(spans.kv_lengths - rule.sliding_window, 0) if rule.sliding_window else 0 * spans.kv_lengths
    first_pieces = _first_pieces(begins, spans.kv_lengths, keys_PGCD.shape[2])
    tasks = first_pieces[-1] * groups
    out_SHD = torch.empty(len(spans.rows), heads, value_dim)
    sinks_H = torch.full((heads,), -math.inf) if rule.sinks_H is None else rule.sinks_H.float()
    with numba_threads() as threads:
        _decode(
            threads,
            query_THD.float().contiguous().numpy(),
            _as_numpy(keys_PGCD),
            _as_numpy(values_PGCD),
            spans.rows,
            begins,
            spans.kv_lengths,
            spans.page_starts,
            spans.page_ids,
            first_pieces,
            np.repeat(np.arange(len(spans.rows)), np.diff(first_pieces)),
            np.float32(rule.scaling),
            np.float32(rule.softcap or 0),
            sinks_H.numpy(),
            np.zeros(1 + out_SHD.shape[0] * groups, np.int64),
            torch.empty(2, tasks, heads // groups).numpy(),
            torch.empty(tasks, heads // groups, -(-value_dim // BLOCK) * BLOCK).numpy(),
            out_SHD.numpy(),
        )
    out_THD[torch.from_numpy(spans.rows)] = out_SHD.to(out_THD.dtype)


def _as_numpy(pages: torch.Tensor) -> npt.NDArray[np.generic]:
    return pages.view(torch.uint16).numpy() if pages.dtype == torch.bfloat16 else pages.numpy()


def _first_pieces(begins: Ints, lengths: Ints, page_tokens: int) -> Ints:
    """`[S + 1]`: span s is pieces `[s]` to `[s + 1]`, cut from the first page that its query sees."""
    pages = -(-lengths // page_tokens) - begins // page_tokens
    first_pieces = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(-(-pages // max(_PIECE_TOKENS // page_tokens, 1)), out=first_pieces[1:])
    return first_pieces


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _decode(  # type: ignore[no-untyped-def]
    threads, query, keys, values, rows, begins, ends, page_starts, page_ids, first_pieces, piece_spans,
    scaling, cap, sinks, counters, states, accs, out,
):  # fmt: skip
    for _ in numba.prange(threads):
        _work(
            query, keys, values, rows, begins, ends, page_starts, page_ids, first_pieces, piece_spans,
            scaling, cap, sinks, counters, states, accs, out,
        )  # fmt: skip


@_jit
def _work(  # type: ignore[no-untyped-def]
    query, keys, values, rows, begins, ends, page_starts, page_ids, first_pieces, piece_spans,
    scaling, cap, sinks, counters, states, accs, out,
):  # fmt: skip
    """Takes tasks until none is left; whoever ends the last piece of a span's KV head merges them."""
    groups, page_tokens, key_dim = keys.shape[1:]
    value_dim, repeat = values.shape[3], query.shape[1] // groups
    tiles = (repeat + MAX_ROWS - 1) // MAX_ROWS
    tile = (repeat + tiles - 1) // tiles
    shape = _Shape(groups, repeat, tile, page_tokens, key_dim, value_dim, keys.itemsize, accs.shape[2])
    depths = (key_dim + DEPTH - 1) // DEPTH
    table = np.empty(DEPTH + 1, np.int64)
    floats = np.zeros(16 + (key_dim + DEPTH) * BLOCK + (depths + 1) * repeat * X_STRIDE, np.float32)
    flipped = (floats.ctypes.data + 63) // 64 * 64  # vectors that straddle cache lines cost twice
    rest = flipped + key_dim * BLOCK * _FLOAT
    scores = rest + DEPTH * BLOCK * _FLOAT
    own = scores + repeat * X_STRIDE * _FLOAT
    scratch = _Scratch(own, flipped, rest, scores, table.ctypes.data)
    piece_pages = max(_PIECE_TOKENS // page_tokens, 1)
    while True:
        task = take_number(counters.ctypes.data)
        if task >= accs.shape[0]:
            break
        number, group = task // groups, task % groups
        span = piece_spans[number]
        low, high = begins[span], ends[span]
        first = low // page_tokens + (number - first_pieces[span]) * piece_pages
        end = min(first + piece_pages, (high + page_tokens - 1) // page_tokens)
        for r in range(repeat):
            states[0, task, r] = -np.inf
            states[1, task, r] = 0
            for d in range(key_dim):
                place = (d // DEPTH * repeat + r) * X_STRIDE + d % DEPTH
                put(own + place * _FLOAT, query[rows[span], group * repeat + r, d] * scaling)
        _attend(
            keys.dtype.type(0),
            shape,
            scratch,
            _Piece(first, end, low, high),
            keys.ctypes.data + group * page_tokens * key_dim * shape.size,
            values.ctypes.data + group * page_tokens * value_dim * shape.size,
            page_ids[page_starts[span] :],
            cap,
            _State(
                states.ctypes.data + task * repeat * _FLOAT,
                states.ctypes.data + (accs.shape[0] + task) * repeat * _FLOAT,
                accs.ctypes.data + task * repeat * shape.out_stride * _FLOAT,
            ),
        )
        ended = take_number(counters.ctypes.data + 8 * (1 + span * groups + group)) + 1
        if ended == first_pieces[span + 1] - first_pieces[span]:
            some = slice(first_pieces[span] * groups + group, first_pieces[span + 1] * groups, groups)
            for r in range(repeat):
                head = group * repeat + r
                _merge(states[0, some, r], states[1, some, r], accs[some, r], sinks[head], out[span, head])


@_jit
def _merge(best_N, total_N, acc_ND, sink, out_D):  # type: ignore[no-untyped-def]
    """One head's answer, from the softmax states of its pieces and its sink."""
    top = sink
    for n in range(len(best_N)):
        top = max(top, best_N[n])
    sum_ = np.float32(math.exp(sink - top))
    out_D[:] = 0
    for n in range(len(best_N)):
        factor = np.float32(math.exp(best_N[n] - top))
        sum_ += factor * total_N[n]
        for d in range(len(out_D)):
            out_D[d] += factor * acc_ND[n, d]
    for d in range(len(out_D)):
        out_D[d] /= sum_


@_jit
def _attend(kind, shape, scratch, piece, keys, values, page_ids, cap, state):  # type: ignore[no-untyped-def]
    """The softmax state of one KV head after a piece; `keys` and `values` are that head's in page 0."""
    page_tokens, size = shape.page_tokens, shape.size
    key_page, value_page = shape.groups * page_tokens * shape.key_dim, shape.groups * page_tokens * shape.value_dim
    together = page_tokens % BLOCK == 0 and DEPTH % page_tokens == 0  # whole pages fill DEPTH tokens
    last = piece.end - 1
    clear(state.acc, shape.repeat * shape.out_stride // LANES)
    start, end = piece.first * page_tokens, min(piece.high, piece.end * page_tokens)
    if not together:  # nothing is softened before there is a token to see
        start += max(piece.low - start, 0) // BLOCK * BLOCK
    while start < end:
        stop = min(start + DEPTH, end)
        if not together:
            stop = min(stop, start - start % page_tokens + page_tokens)
        for token in range(start, stop, BLOCK):
            page, slot = token // page_tokens, token % page_tokens
            key = keys + (page_ids[page] * key_page + slot * shape.key_dim) * size
            ahead = keys + (page_ids[min(page + 1, last)] * key_page + slot * shape.key_dim) * size
            _score(kind, shape, scratch, key, min(stop - token, BLOCK), token - start, ahead)
        _soften(shape, scratch, piece.low - start, stop - start, cap, state)
        rows = min(page_tokens, DEPTH)
        slot = start % page_tokens * shape.value_dim
        for n in range((stop - start + rows - 1) // rows + 1):
            page = page_ids[min(start // page_tokens + n, last)]
            put(scratch.table + n * 8, values + (page * value_page + slot) * size)
        _add_values(kind, shape, scratch, stop - start, rows, state.acc)
        start = stop


@_jit
def _score(kind, shape, scratch, key, tokens, column, ahead):  # type: ignore[no-untyped-def]
    """`scores[r, column + c] = own[r] . key[c]` for at most BLOCK tokens c; prefetches as many keys at `ahead`."""
    _flip(kind, shape, key, tokens, scratch.flipped)
    for d in range(0, shape.key_dim, DEPTH):
        depth = min(DEPTH, shape.key_dim - d)
        put(scratch.table, scratch.flipped + d * BLOCK * _FLOAT)
        put(scratch.table + 8, ahead + d * BLOCK * shape.size)
        for r in range(0, shape.repeat, shape.tile):
            product(
                np.float32(0), kind, d == 0, min(shape.tile, shape.repeat - r), depth,
                scratch.own + (d // DEPTH * shape.repeat + r) * X_STRIDE * _FLOAT,
                scratch.table, depth, 0, BLOCK, BLOCK,
                scratch.scores + (r * X_STRIDE + column) * _FLOAT, X_STRIDE,
            )  # fmt: skip


@_jit
def _flip(kind, shape, key, tokens, flipped):  # type: ignore[no-untyped-def]
    """`flipped[d, c] = key[min(c, tokens - 1), d]` for BLOCK columns c (or garbage in columns >= tokens)."""
    dim, size = shape.key_dim, shape.size
    width = LANES if size == _FLOAT else 2 * LANES
    whole = dim - dim % width
    for half in range(2):
        first = min(half * LANES, tokens - 1)
        last = min(tokens - 1 - first, LANES - 1)
        for d in range(0, whole, width):
            source, to = key + (first * dim + d) * size, flipped + (d * BLOCK + half * LANES) * _FLOAT
            transpose(kind, source, dim, last, to, BLOCK)
    for d in range(whole, dim):
        for c in range(tokens):
            widen(kind, key + (c * dim + d) * size, flipped + (d * BLOCK + c) * _FLOAT)


@_jit
def _soften(shape, scratch, low, tokens, cap, state):  # type: ignore[no-untyped-def]
    """Scores of `tokens` columns become weights; what was summed before shrinks to the new maximum."""
    vectors = (tokens + BLOCK - 1) // BLOCK * 2
    for r in range(shape.repeat):
        row = scratch.scores + r * X_STRIDE * _FLOAT
        if cap > 0:
            softcap(row, vectors, cap)
        shrink = soften(row, vectors, low, tokens, state.best + r * _FLOAT, state.total + r * _FLOAT)
        scale(state.acc + r * shape.out_stride * _FLOAT, shape.out_stride // LANES, shrink)


@_jit
def _add_values(kind, shape, scratch, tokens, panel_rows, acc):  # type: ignore[no-untyped-def]
    """`acc[r] += sum over c < tokens of weights[r, c] * value[c]`, for the values at the addresses in the table."""
    dim = shape.value_dim
    whole = dim - dim % BLOCK
    for r in range(0, shape.repeat, shape.tile):
        rows, weights = min(shape.tile, shape.repeat - r), scratch.scores + r * X_STRIDE * _FLOAT
        for d in range(0, whole, BLOCK):
            product(
                kind, kind, 0, rows, tokens, weights, scratch.table, panel_rows, d * shape.size, dim, dim,
                acc + (r * shape.out_stride + d) * _FLOAT, shape.out_stride,
            )  # fmt: skip
    if whole < dim:
        _add_rest(kind, shape, scratch, tokens, panel_rows, whole, acc)


@_jit
def _add_rest(kind, shape, scratch, tokens, panel_rows, whole, acc):  # type: ignore[no-untyped-def]
    """The columns of values that are no whole block, through a copy."""
    for c in range(tokens):
        value = get(scratch.table + c // panel_rows * 8) + c % panel_rows * shape.value_dim * shape.size
        for d in range(whole, shape.value_dim):
            widen(kind, value + d * shape.size, scratch.rest + (c * BLOCK + d - whole) * _FLOAT)
    put(scratch.table, scratch.rest)
    put(scratch.table + 8, scratch.rest)
    for r in range(0, shape.repeat, shape.tile):
        product(
            np.float32(0), kind, 0, min(shape.tile, shape.repeat - r), tokens,
            scratch.scores + r * X_STRIDE * _FLOAT, scratch.table, tokens, 0, BLOCK, 0,
            acc + (r * shape.out_stride + whole) * _FLOAT, shape.out_stride,
        )  # fmt: skip

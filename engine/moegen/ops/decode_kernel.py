"""Decode attention on the CPU: one query per sequence, keys and values read once, in place, page by page.

Compiled with Numba at first use (and cached on disk), so that installing needs no compiler. Pages are float32, bfloat16
or int8 codes; arithmetic is float32. A code is taken as the number that it is: the scales of keys multiply the scores,
those of values the weights, once for each query head and token. A task is one KV head over one piece of a sequence: all
R query heads of the group meet a page while it is in cache. Both products are a few rows times a panel BLOCK columns
wide: queries times a page's keys (transposed into a scratch panel), weights times its values. The softmax subtracts the
running maximum (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"). A core waits for few lines of
memory at a time, so they are asked for evenly: a block's values while its keys are scored, the next block's keys, or
those of the thread's next task, while its values are added.

Over latents (`moegen.ops.latent_heads`) all query heads share one key per token, whose first elements are the value
too: about two multiply-adds per head and element of a page, so arithmetic binds, not memory. A task is then a block of
heads, few enough that their queries and answers stay in a core's second-level cache, and values are widened once for
all of them.

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
from numba.extending import register_jitable

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import numba_threads
from moegen.ops.vectors import (
    BLOCK,
    DEPTH,
    LANES,
    MAX_ROWS,
    SOFT_ROWS,
    X_STRIDE,
    add_scaled,
    clear,
    fetch,
    get,
    get_float,
    multiply,
    product,
    put,
    scale,
    softcap,
    soften,
    take_number,
    transpose,
    widen,
    widen_block,
)
from moegen.schedule.step import DecodeSpans, Ints

if TYPE_CHECKING:
    from moegen.ops.attention import AttentionRule
    from moegen.ops.kv_pages import LayerPages

KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of the pages that the kernel reads
PIECE_TOKENS = 1024  # a longer sequence is cut, so that a few long ones keep every core busy
_FLOAT = 4  # bytes
_BLOCK_HEADS = 64  # over latents
_NO_SCALES = np.zeros((1, 1, 1), np.float32)

lock_kernel_cache()
_jit = numba.njit(error_model="numpy")


class _Shape(NamedTuple):
    groups: int  # KV heads, or blocks of the query heads over latents
    kv_heads: int  # as many, or 1 over latents
    repeat: int  # query heads of a group
    tile: int  # of these that a product takes at once
    page_tokens: int
    key_dim: int
    value_dim: int
    value_stride: int  # from one token's value to the next: over latents, a key's dim
    size: int  # bytes of an element of a page
    out_stride: int  # value_dim, up to whole blocks


class _Spans(NamedTuple):
    """Addresses: arrays would be counted, by all threads, whenever they are passed on."""

    rows: int  # [S] the token's index
    begins: int  # [S] the first token that the query sees
    ends: int  # [S] the tokens
    page_starts: int  # [S + 1]
    page_ids: int
    first_pieces: int  # [S + 1]
    piece_spans: int  # [N] which span a piece is of
    first_states: int  # [S + 1] of the pieces of spans that are more than one piece
    keys: int
    values: int
    key_scales: int  # of codes, else of nothing
    value_scales: int
    tasks: int  # how many


class _Scratch(NamedTuple):
    """Addresses of what one thread works in, float32 but for the tables, which have addresses."""

    own: int  # [key_dim / DEPTH, R, X_STRIDE] queries
    flipped: int  # [key_dim, BLOCK] keys
    panel: int  # [DEPTH, BLOCK] columns of values
    scales: int  # [DEPTH] of tokens
    scores: int  # [R, X_STRIDE] of DEPTH tokens
    state: int  # of a span that is one piece
    panels: int  # [DEPTH] of what is multiplied
    aheads: int  # [DEPTH] of what is asked for beside it
    copies: int  # [DEPTH] of pieces of `panel`


class _Piece(NamedTuple):
    """What a task is about: a KV head, and tokens `start` to `end` of a sequence whose query sees [low, high)."""

    span: int
    group: int
    number: int
    start: int
    end: int
    low: int
    high: int
    first_id: int  # where the sequence's page ids begin


class _State(NamedTuple):
    """Addresses of one KV head's softmax after a piece."""

    best: int  # [R] running maximum
    total: int  # [R] running sum
    shrink: int  # [R] factor of the last step
    acc: int  # [R, out_stride] weighted values


def kernel_reads(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the kernel can serve these tensors; otherwise the torch way does."""
    return query.device.type == "cpu" and keys.device.type == "cpu" and keys.dtype in KV_DTYPES


def decode_attention(
    query_THD: torch.Tensor,
    pages: LayerPages,
    spans: DecodeSpans,
    rule: AttentionRule,
    out_THD: torch.Tensor,
) -> None:
    """Writes the attention of each span's query into its row of `out_THD`."""
    keys_PGCD, *others = pages.tables
    values_PGCD, *scales = others or [keys_PGCD]  # over latents, what is kept is both
    heads, value_dim = out_THD.shape[1:]
    groups = keys_PGCD.shape[1] if others else _head_blocks(heads)
    repeat = heads // groups
    begins, first_pieces = cut(spans, rule, keys_PGCD.shape[2])
    pieces = np.diff(first_pieces)
    first_states = np.cumsum(np.append(0, np.where(pieces > 1, pieces, 0)))
    in_place = out_THD.dtype == torch.float32 and out_THD.is_contiguous()
    answer_THD = out_THD if in_place else torch.empty(out_THD.shape)
    sinks_H = torch.full((heads,), -math.inf) if rule.sinks_H is None else rule.sinks_H.float()
    with numba_threads() as threads:
        _decode(
            threads,
            groups,
            query_THD.float().contiguous().numpy(),
            _as_numpy(keys_PGCD),
            _as_numpy(values_PGCD),
            *([scale_PGC.numpy() for scale_PGC in scales] or [_NO_SCALES, _NO_SCALES]),
            spans.rows,
            begins,
            spans.kv_lengths,
            spans.page_starts,
            spans.page_ids,
            first_pieces,
            np.repeat(np.arange(len(pieces)), pieces),
            first_states,
            np.float32(rule.scaling),
            np.float32(rule.softcap or 0),
            sinks_H.numpy(),
            np.zeros(1 + len(pieces) * groups, np.int64),
            torch.empty(first_states[-1] * groups, _state_floats(repeat, value_dim)).numpy(),
            torch.zeros(threads, _scratch_floats(repeat, query_THD.shape[2], value_dim)).numpy(),
            np.zeros((threads, 3 * DEPTH), np.int64),
            answer_THD.numpy(),
        )
    if not in_place:
        rows = torch.from_numpy(spans.rows)
        out_THD[rows] = answer_THD[rows].to(out_THD.dtype)


def _head_blocks(heads: int) -> int:
    """Into how many blocks of equal size query heads over latents are cut."""
    return next(blocks for blocks in range(-(-heads // _BLOCK_HEADS), heads + 1) if heads % blocks == 0)


def _as_numpy(pages: torch.Tensor) -> npt.NDArray[np.generic]:
    return pages.view(torch.uint16).numpy() if pages.dtype == torch.bfloat16 else pages.numpy()


def cut(spans: DecodeSpans, rule: AttentionRule, page_tokens: int) -> tuple[Ints, Ints]:
    """`[S]` the first token that each span's query sees; `[S + 1]`: span s is pieces `[s]` to `[s + 1]`, cut from the
    page of that token."""
    lengths = spans.kv_lengths
    begins = np.maximum(lengths - rule.sliding_window, 0) if rule.sliding_window else 0 * lengths
    pages = -(-lengths // page_tokens) - begins // page_tokens
    first_pieces = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(-(-pages // max(PIECE_TOKENS // page_tokens, 1)), out=first_pieces[1:])
    return begins, first_pieces


@register_jitable
def _state_floats(repeat: int, value_dim: int) -> int:
    """What the softmax of one KV head takes."""
    return (3 * repeat + LANES - 1) // LANES * LANES + repeat * ((value_dim + BLOCK - 1) // BLOCK * BLOCK)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _decode(  # type: ignore[no-untyped-def]
    threads, groups, query, keys, values, key_scales, value_scales, rows, begins, ends, page_starts, page_ids,
    first_pieces, piece_spans, first_states, scaling, cap, sinks, counters, states, floats, tables, out,
):  # fmt: skip
    for thread in numba.prange(threads):
        shape = _shape(groups, query, keys, values, out)
        scratch = _lay_out(
            shape, floats.ctypes.data + thread * floats.shape[1] * _FLOAT,
            tables.ctypes.data + thread * tables.shape[1] * 8,
        )  # fmt: skip
        spans = _Spans(
            rows.ctypes.data, begins.ctypes.data, ends.ctypes.data, page_starts.ctypes.data, page_ids.ctypes.data,
            first_pieces.ctypes.data, piece_spans.ctypes.data, first_states.ctypes.data, keys.ctypes.data,
            values.ctypes.data, key_scales.ctypes.data, value_scales.ctypes.data, len(piece_spans) * groups,
        )  # fmt: skip
        _work(
            keys.dtype.type(0), shape, scratch, spans, query.ctypes.data, scaling, cap, sinks.ctypes.data,
            counters.ctypes.data, states.ctypes.data, out.ctypes.data,
        )  # fmt: skip


@_jit
def _work(kind, shape, scratch, spans, query, scaling, cap, sinks, counter, states, out):  # type: ignore[no-untyped-def]
    """Takes tasks until none is left; whoever ends the last piece of a span's KV head merges them."""
    state_bytes = _state_floats(shape.repeat, shape.value_dim) * _FLOAT
    task = take_number(counter)
    while task < spans.tasks:
        piece = _piece(task, shape, spans)
        first_piece = get(spans.first_pieces + 8 * piece.span)
        pieces = get(spans.first_pieces + 8 * piece.span + 8) - first_piece
        first_state, step = scratch.state, state_bytes * shape.groups
        if pieces > 1:
            first_state = states + get(spans.first_states + 8 * piece.span) * step + piece.group * state_bytes
        state = _state(shape, first_state + (piece.number - first_piece) * step)
        row = (get(spans.rows + 8 * piece.span) * shape.groups + piece.group) * shape.repeat
        _take_queries(shape, scratch, query, row, scaling)
        task = _attend(kind, shape, scratch, spans, piece, cap, state, counter)
        if take_number(counter + 8 * (1 + piece.span * shape.groups + piece.group)) + 1 == pieces:
            own_sinks = sinks + piece.group * shape.repeat * _FLOAT
            _merge(shape, first_state, step, pieces, own_sinks, out + row * shape.value_dim * _FLOAT)


@_jit
def _shape(groups, query, keys, values, out):  # type: ignore[no-untyped-def]
    kv_heads, page_tokens, key_dim = keys.shape[1:]
    value_dim, repeat = out.shape[2], query.shape[1] // groups
    tiles = (repeat + MAX_ROWS - 1) // MAX_ROWS
    out_stride = (value_dim + BLOCK - 1) // BLOCK * BLOCK
    return _Shape(
        groups, kv_heads, repeat, (repeat + tiles - 1) // tiles, page_tokens, key_dim, value_dim, values.shape[3],
        keys.itemsize, out_stride,
    )  # fmt: skip


def _scratch_floats(repeat: int, key_dim: int, value_dim: int) -> int:
    """What a thread works in, as `_lay_out` cuts it."""
    x_rows = (1 + -(-key_dim // DEPTH)) * repeat
    return (key_dim + DEPTH) * BLOCK + DEPTH + x_rows * X_STRIDE + _state_floats(repeat, value_dim)


@_jit
def _lay_out(shape, floats, table):  # type: ignore[no-untyped-def]
    """Where in the thread's memory what lies: everything begins with a cache line."""
    flipped = floats
    panel = flipped + shape.key_dim * BLOCK * _FLOAT
    scales = panel + DEPTH * BLOCK * _FLOAT
    scores = scales + DEPTH * _FLOAT
    own = scores + shape.repeat * X_STRIDE * _FLOAT
    state = own + (shape.key_dim + DEPTH - 1) // DEPTH * shape.repeat * X_STRIDE * _FLOAT
    return _Scratch(
        own, flipped, panel, scales, scores, state, table, table + 8 * DEPTH, table + 2 * 8 * DEPTH
    )  # fmt: skip


@_jit
def _piece(task, shape, spans):  # type: ignore[no-untyped-def]
    """The task of this number."""
    number, group = task // shape.groups, task % shape.groups
    span = get(spans.piece_spans + 8 * number)
    low, high, page_tokens = get(spans.begins + 8 * span), get(spans.ends + 8 * span), shape.page_tokens
    piece_tokens = max(PIECE_TOKENS // page_tokens, 1) * page_tokens
    start = low // page_tokens * page_tokens + (number - get(spans.first_pieces + 8 * span)) * piece_tokens
    end = min(start + piece_tokens, high)
    if not _together(shape):  # nothing is softened before there is a token to see
        start += max(low - start, 0) // BLOCK * BLOCK
    return _Piece(span, group, number, start, end, low, high, get(spans.page_starts + 8 * span))


@_jit
def _place(shape, spans, piece, token, pages, row_bytes):  # type: ignore[no-untyped-def]
    """The address of what pages have of a token, `row_bytes` of it."""
    page = get(spans.page_ids + 8 * (piece.first_id + token // shape.page_tokens))
    kv_head = min(piece.group, shape.kv_heads - 1)
    row = (page * shape.kv_heads + kv_head) * shape.page_tokens + token % shape.page_tokens
    return pages + row * row_bytes


@_jit
def _together(shape):  # type: ignore[no-untyped-def]
    """Whether whole pages fill DEPTH tokens."""
    return shape.page_tokens % BLOCK == 0 and DEPTH % shape.page_tokens == 0


@_jit
def _has_values(shape):  # type: ignore[no-untyped-def]
    """Of their own, which latents have not."""
    return shape.groups == shape.kv_heads and shape.value_dim == shape.value_stride


@_jit
def _state(shape, address):  # type: ignore[no-untyped-def]
    row = shape.repeat * _FLOAT
    return _State(
        address, address + row, address + 2 * row, address + (3 * shape.repeat + LANES - 1) // LANES * LANES * _FLOAT
    )


@_jit
def _take_queries(shape, scratch, query, row, scaling):  # type: ignore[no-untyped-def]
    """The query heads of a KV head, of which the first is row `row`, to where products want them."""
    for r in range(shape.repeat):
        for d in range(0, shape.key_dim, DEPTH):
            source = query + ((row + r) * shape.key_dim + d) * _FLOAT
            to = scratch.own + (d // DEPTH * shape.repeat + r) * X_STRIDE * _FLOAT
            add_scaled(1, source, min(DEPTH, shape.key_dim - d), scaling, to)


@_jit
def _merge(shape, first_state, step, pieces, sinks, out):  # type: ignore[no-untyped-def]
    """The answers of a KV head's query heads, from the softmax states of its pieces and their sinks."""
    for r in range(shape.repeat):
        sink = get_float(sinks + r * _FLOAT)
        top = sink
        for n in range(pieces):
            top = max(top, get_float(_state(shape, first_state + n * step).best + r * _FLOAT))
        sum_ = np.float32(math.exp(sink - top))
        for n in range(pieces):
            state = _state(shape, first_state + n * step)
            factor = np.float32(math.exp(get_float(state.best + r * _FLOAT) - top))
            sum_ += factor * get_float(state.total + r * _FLOAT)
        for n in range(pieces):
            state = _state(shape, first_state + n * step)
            factor = np.float32(math.exp(get_float(state.best + r * _FLOAT) - top)) / sum_
            acc = state.acc + r * shape.out_stride * _FLOAT
            add_scaled(n == 0, acc, shape.value_dim, factor, out + r * shape.value_dim * _FLOAT)


@_jit
def _attend(kind, shape, scratch, spans, piece, cap, state, counter):  # type: ignore[no-untyped-def]
    """Works through a piece, block by block, and returns the number of the thread's next task.

    Memory is busy all the time: while a block's keys are scored its values are on their way, and while its values are
    added the keys of the next block, which may be the next task's.
    """
    for r in range(shape.repeat):
        put(state.best + r * _FLOAT, np.float32(-np.inf))
        put(state.total + r * _FLOAT, np.float32(0))
    clear(state.acc, shape.repeat * shape.out_stride // LANES)
    key_bytes, value_bytes = shape.key_dim * shape.size, shape.value_stride * shape.size
    start, task, then = piece.start, -1, piece
    while start < piece.end:
        stop = _block_end(shape, start, piece.end)
        for token in range(start, stop, BLOCK):
            key = _place(shape, spans, piece, token, spans.keys, key_bytes)
            ahead = token if _has_values(shape) else min(token + BLOCK, piece.end - 1)
            ahead = _place(shape, spans, piece, ahead, spans.values, value_bytes)
            _score(kind, shape, scratch, key, min(stop - token, BLOCK), token - start, ahead)
        if shape.size == 1:
            _scale_columns(shape, scratch, spans, piece, start, stop, spans.key_scales)
        _soften(shape, scratch, piece.low - start, stop - start, cap, state)
        if shape.size == 1:
            _scale_columns(shape, scratch, spans, piece, start, stop, spans.value_scales)
        following = stop
        if stop == piece.end:
            task = take_number(counter)
            then = _piece(min(task, spans.tasks - 1), shape, spans)
            following = then.start
        rows = min(shape.page_tokens, DEPTH)
        for n in range((stop - start + rows - 1) // rows):
            ahead = min(following + n * rows, then.end - 1)
            put(scratch.panels + n * 8, _place(shape, spans, piece, start + n * rows, spans.values, value_bytes))
            put(scratch.aheads + n * 8, _place(shape, spans, then, ahead, spans.keys, key_bytes))
            if shape.size == 1:
                fetch(_place(shape, spans, then, ahead, spans.key_scales, _FLOAT), rows * _FLOAT)
                fetch(_place(shape, spans, then, ahead, spans.value_scales, _FLOAT), rows * _FLOAT)
        _add_values(kind, shape, scratch, stop - start, rows, state.acc)
        start = stop
    return task


@_jit
def _block_end(shape, start, end):  # type: ignore[no-untyped-def]
    """At most DEPTH tokens make a block: several whole pages, blocks of about equal size, or a part of one page."""
    page_tokens = shape.page_tokens
    if not _together(shape):
        return min(start + DEPTH, start - start % page_tokens + page_tokens, end)
    pages = (end - start + page_tokens - 1) // page_tokens
    blocks = (pages * page_tokens + DEPTH - 1) // DEPTH
    return min(start + pages // blocks * page_tokens, end)


@_jit
def _score(kind, shape, scratch, key, tokens, column, ahead):  # type: ignore[no-untyped-def]
    """`scores[r, column + c] = own[r] . key[c]` for at most BLOCK tokens c; prefetches as many values at `ahead`."""
    _flip(kind, shape.key_dim, shape.size, key, tokens, scratch.flipped)
    ahead_stride = BLOCK * shape.value_stride * shape.size // shape.key_dim
    for d in range(0, shape.key_dim, DEPTH):
        depth = min(DEPTH, shape.key_dim - d)
        put(scratch.panels, scratch.flipped + d * BLOCK * _FLOAT)
        put(scratch.aheads, ahead + d * ahead_stride)
        for r in range(0, shape.repeat, shape.tile):
            product(
                np.float32(0), kind, d == 0, min(shape.tile, shape.repeat - r), depth,
                scratch.own + (d // DEPTH * shape.repeat + r) * X_STRIDE * _FLOAT,
                scratch.panels, depth, 0, BLOCK, scratch.aheads, 0, ahead_stride,
                scratch.scores + (r * X_STRIDE + column) * _FLOAT, X_STRIDE,
            )  # fmt: skip


@_jit
def _flip(kind, dim, size, key, tokens, flipped):  # type: ignore[no-untyped-def]
    """`flipped[d, c] = key[min(c, tokens - 1), d]` for BLOCK columns c (or garbage in columns >= tokens)."""
    width = LANES * _FLOAT // size  # elements of LANES words
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
def _scale_columns(shape, scratch, spans, piece, start, stop, scales):  # type: ignore[no-untyped-def]
    """`scores[r, c] *= scale[c]` for the tokens from `start` to `stop`; columns beyond them stay garbage, or 0."""
    token = start
    while token < stop:
        count = min(shape.page_tokens - token % shape.page_tokens, stop - token)
        place = _place(shape, spans, piece, token, scales, _FLOAT)
        add_scaled(1, place, count, np.float32(1), scratch.scales + (token - start) * _FLOAT)
        token += count
    vectors = (stop - start + LANES - 1) // LANES
    for r in range(shape.repeat):
        multiply(scratch.scores + r * X_STRIDE * _FLOAT, vectors, scratch.scales)


@_jit
def _soften(shape, scratch, low, tokens, cap, state):  # type: ignore[no-untyped-def]
    """Scores of `tokens` columns become weights; what was summed before shrinks to the new maximum."""
    vectors = (tokens + BLOCK - 1) // BLOCK * 2
    for r in range(0, shape.repeat, SOFT_ROWS):
        row, rows, here = scratch.scores + r * X_STRIDE * _FLOAT, min(SOFT_ROWS, shape.repeat - r), r * _FLOAT
        if cap > 0:
            for i in range(rows):
                softcap(row + i * X_STRIDE * _FLOAT, vectors, cap)
        soften(rows, row, vectors, low, tokens, state.best + here, state.total + here, state.shrink + here)
    for r in range(shape.repeat):
        scale(state.acc + r * shape.out_stride * _FLOAT, shape.out_stride // LANES, state.shrink + r * _FLOAT)


@_jit
def _add_values(kind, shape, scratch, tokens, panel_rows, acc):  # type: ignore[no-untyped-def]
    """`acc[r] += sum over c < tokens of weights[r, c] * value[c]`, for the values at the addresses in the table.

    They are copied, as float32, where they fill no whole vectors and where several tiles of heads meet them.
    """
    dim, tiles = shape.value_dim, (shape.repeat + shape.tile - 1) // shape.tile
    ahead_stride = BLOCK * shape.key_dim * shape.size // (max(dim - dim % BLOCK, BLOCK) * tiles)
    for d in range(0, dim, BLOCK):
        columns = min(BLOCK, dim - d)
        copied = columns < BLOCK or tiles > 1
        if copied:
            _widen_columns(kind, shape, scratch, tokens, panel_rows, d, columns)
        for r in range(0, shape.repeat, shape.tile):
            rows, weights = min(shape.tile, shape.repeat - r), scratch.scores + r * X_STRIDE * _FLOAT
            ahead = (d // BLOCK * tiles + r // shape.tile) * panel_rows * ahead_stride
            to = acc + (r * shape.out_stride + d) * _FLOAT
            if copied:
                product(
                    np.float32(0), kind, 0, rows, tokens, weights, scratch.copies, panel_rows, 0, BLOCK,
                    scratch.aheads, ahead, ahead_stride, to, shape.out_stride,
                )  # fmt: skip
            else:
                product(
                    kind, kind, 0, rows, tokens, weights, scratch.panels, panel_rows, d * shape.size,
                    shape.value_stride, scratch.aheads, ahead, ahead_stride, to, shape.out_stride,
                )  # fmt: skip


@_jit
def _widen_columns(kind, shape, scratch, tokens, panel_rows, first, columns):  # type: ignore[no-untyped-def]
    """`panel[c, i] = value[c, first + i]` for `columns` of the tokens' values, and where its pieces begin."""
    for c in range(tokens):
        place = scratch.panel + c * BLOCK * _FLOAT
        if c % panel_rows == 0:
            put(scratch.copies + c // panel_rows * 8, place)
        value = get(scratch.panels + c // panel_rows * 8)
        value += (c % panel_rows * shape.value_stride + first) * shape.size
        if columns == BLOCK:
            widen_block(kind, value, place)
        else:
            for i in range(columns):
                widen(kind, value + i * shape.size, place + i * _FLOAT)

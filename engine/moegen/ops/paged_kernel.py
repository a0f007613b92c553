"""Attention on the CPU: keys and values are read in place, page by page, for one query of a sequence or for many.

Compiled with Numba at first use (and cached on disk), so that installing needs no compiler. Pages are float32, bfloat16
or int8 codes; arithmetic is float32. A code is taken as the number that it is: the scales of keys multiply the scores,
those of values the weights, once for each row and token. Both products are a few rows times a panel BLOCK columns wide:
queries times a page's keys (transposed into a scratch panel), weights times its values. The softmax subtracts the
running maximum (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").

Where queries and weights may be rounded, and the processor multiplies bfloat16, products take two elements at a time:
neighbours of a query and of a key, weights of two tokens and their values. They are exact, and added in float32.

A core waits for few lines of memory at a time, so they are asked for evenly: a block's values while its keys are
scored, the next block's keys, or those of the thread's next task, while its values are added. Of what comes after that
one line is asked for, so that its address has been translated by then: lines behind one that has not all wait.

A task is one KV head for some consecutive queries of a sequence (a prompt's, or the one that decodes): the R query
heads of the group are rows, query after query, and all of them meet a page while it is in cache. The keys of a single
query are cut into pieces, a task each, so that a few long sequences keep every core busy.

Over latents (`moegen.ops.latent_heads`) all query heads share one key per token, whose first elements are the value
too: about two multiply-adds per head and element of a page, so arithmetic binds, not memory. A task is then a block of
heads, few enough that their queries and answers stay in a core's second-level cache, and values are widened once for
all of them.

Threads take tasks from one counter, so a ragged batch is balanced. Blocks and pieces begin at fixed tokens of their
sequence, and pieces are folded in order: a query's answer is the same, bit for bit, whatever the number of threads, the
rest of the batch, and the queries beside it; so a prompt may be cut anywhere.

Shape suffixes: S spans, T tokens, H query heads, G KV heads, R = H / G, P pages, C tokens per page, D dim, N tasks.
Addresses and offsets are in bytes, strides in elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.extending import register_jitable

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import numba_threads
from moegen.ops.vector_ir import DOTS
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
    own_size,
    pair_block,
    product,
    put,
    scale,
    softcap,
    soften,
    soften_queries,
    take_number,
    take_scaled,
    transpose,
    widen,
    widen_block,
)
from moegen.schedule.step import QuerySpans

if TYPE_CHECKING:
    from moegen.ops.attention import AttentionRule
    from moegen.ops.kv_pages import LayerPages

KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of the pages that the kernel reads
_PIECE_TOKENS = 1024
_BLOCK_HEADS = 64  # over latents
_FLOAT = 4  # bytes
_NO_SCALES = np.zeros((1, 1, 1), np.float32)
_NO_WINDOW = 1 << 30  # tokens, which no sequence has

lock_kernel_cache()
_jit = numba.njit(error_model="numpy")


class _Shape(NamedTuple):
    groups: int  # KV heads, or blocks of the query heads over latents
    kv_heads: int  # as many, or 1 over latents
    repeat: int  # query heads of a group
    rows: int  # of a task, at most
    page_tokens: int
    key_dim: int
    value_dim: int
    value_stride: int  # from one token's value to the next: over latents, a key's dim
    size: int  # bytes of an element of a page
    own_size: int  # of one that is worked with
    out_stride: int  # value_dim, up to whole blocks
    window: int  # tokens that a query sees, itself among them


class _Spans(NamedTuple):
    """Addresses: arrays would be counted, by all threads, whenever they are passed on."""

    rows: int  # [S] the first query's index
    queries: int  # [S]
    begins: int  # [S] the first token that the first query sees
    ends: int  # [S] the tokens up to the last query
    page_starts: int  # [S + 1]
    page_ids: int
    first_tasks: int  # [S + 1]
    task_spans: int  # [N] which span a task is of
    first_states: int  # [S + 1] of the tasks of spans that are more than one
    keys: int
    values: int
    key_scales: int  # of codes, else of nothing
    value_scales: int
    tasks: int  # how many


class _Scratch(NamedTuple):
    """Addresses of what one thread works in, float32 or, where noted, pairs; the tables have addresses."""

    own: int  # [key_dim / DEPTH, rows, X_STRIDE] queries, or pairs
    flipped: int  # [key_dim, BLOCK] keys, or half as many rows of pairs
    panel: int  # [DEPTH, BLOCK] columns of values, or half as many rows of pairs
    scales: int  # [DEPTH] of tokens
    scores: int  # [rows, X_STRIDE] of DEPTH tokens; weights, or pairs, after the softmax
    state: int  # of the piece at hand
    before: int  # the state of the pieces before it, where a task has several
    panels: int  # [DEPTH] of what is multiplied
    aheads: int  # [DEPTH] of what is asked for beside it
    copies: int  # [DEPTH] of pieces of `panel`


class _Task(NamedTuple):
    """A KV head, and tokens `start` to `end` of a sequence, for `queries` queries of which the last sees [.., high)."""

    span: int
    group: int
    number: int
    queries: int
    start: int
    end: int
    high: int
    first_id: int  # where the sequence's page ids begin


class _Ahead(NamedTuple):
    """How far keys have been asked for."""

    number: int  # of the thread's next task, once all keys of the one at hand have been; -1 before
    task: _Task  # which of the two the next key is of
    token: int  # whose key is the next one


class _Rows(NamedTuple):
    """Some rows of a task: those of queries `first` to before `end`, and how many of them a product takes at once."""

    first: int
    end: int
    tile: int


class _State(NamedTuple):
    """Addresses of the softmax of a task's rows after a piece."""

    best: int  # [rows] running maximum
    total: int  # [rows] running sum
    shrink: int  # [rows] factor of the last step
    acc: int  # [rows, out_stride] weighted values


@dataclass(frozen=True)
class _Tasks:
    """How the spans of a batch are cut: the same for each KV head."""

    queries: int  # of a span, at most
    begins: npt.NDArray[np.int64]  # [S] the first token that the first query sees
    spans: npt.NDArray[np.int64]  # [N] which span a task is of
    first_tasks: npt.NDArray[np.int64]  # [S + 1]
    first_states: npt.NDArray[np.int64]  # [S + 1] of the tasks of spans that are more than one

    @classmethod
    def of(cls, spans: QuerySpans, window: int, page_tokens: int) -> _Tasks:
        """A piece each of what a single query sees; several queries have more to do at once. Cut once for all layers
        that see as far, but for latents, whose spans are made anew."""
        if (own := (_Tasks, window, page_tokens)) in spans.derived:
            return cast(_Tasks, spans.derived[own])
        begins = np.maximum(spans.kv_lengths - spans.queries - window + 1, 0)
        piece = _piece_tokens(page_tokens)
        tasks = np.where(spans.queries > 1, 1, (spans.kv_lengths - 1) // piece - begins // piece + 1)
        first_tasks, first_states = (
            np.cumsum(np.append(0, counts)) for counts in (tasks, np.where(tasks > 1, tasks, 0))
        )  # fmt: skip
        of_span = np.repeat(np.arange(len(tasks)), tasks)
        spans.derived[own] = cut = cls(int(spans.queries.max(initial=1)), begins, of_span, first_tasks, first_states)
        return cut


def kernel_reads(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the kernel can serve these tensors; otherwise the torch way does."""
    return query.device.type == "cpu" and keys.device.type == "cpu" and keys.dtype in KV_DTYPES


def attend_pages(
    query_THD: torch.Tensor, pages: LayerPages, spans: QuerySpans, rule: AttentionRule, out_THD: torch.Tensor, *,
    rounded: bool = False,
) -> None:  # fmt: skip
    """Writes the attention of the spans' queries into their rows of `out_THD`; over latents they are absorbed.

    With `rounded`, queries and weights are rounded to bfloat16 where pages are that too and the processor multiplies
    it; not if a page's tokens make no whole pairs, or its dims no whole blocks of columns.
    """
    keys_PGCD, *others = pages.tables
    values_PGCD, *scales = others or [keys_PGCD]  # over latents, what is kept is both
    heads, value_dim = out_THD.shape[1:]
    groups = keys_PGCD.shape[1] if others else _head_blocks(heads)
    window = rule.sliding_window or _NO_WINDOW
    tasks = _Tasks.of(spans, window, keys_PGCD.shape[2])
    rows = heads // groups * tasks.queries
    own = _worked_with(keys_PGCD, value_dim, rounded)
    in_place = out_THD.dtype == torch.float32 and out_THD.is_contiguous()
    answer_THD = out_THD if in_place else torch.empty(out_THD.shape)
    sinks_H = torch.full((heads,), -math.inf) if rule.sinks_H is None else rule.sinks_H.float()
    threads = numba_threads()
    _attend_all(
        own,
        threads,
        groups,
        window,
        query_THD.float().contiguous().numpy(),
        _as_numpy(keys_PGCD),
        _as_numpy(values_PGCD),
        *([scale_PGC.numpy() for scale_PGC in scales] or [_NO_SCALES, _NO_SCALES]),
        spans.rows,
        spans.queries,
        tasks.begins,
        spans.kv_lengths,
        spans.page_starts,
        spans.page_ids,
        tasks.first_tasks,
        tasks.spans,
        tasks.first_states,
        np.float32(rule.scaling),
        np.float32(rule.softcap or 0),
        sinks_H.numpy(),
        np.zeros(1 + len(tasks.begins) * groups, np.int64),
        torch.empty(tasks.first_states[-1] * groups, _state_floats(rows, value_dim)).numpy(),
        torch.zeros(threads, _scratch_floats(rows, query_THD.shape[2], value_dim)).numpy(),
        np.zeros((threads, 3 * DEPTH), np.int64),
        answer_THD.numpy(),
    )
    if not in_place:
        rows_T = torch.from_numpy(spans.tokens)
        out_THD[rows_T] = answer_THD[rows_T].to(out_THD.dtype)


def _head_blocks(heads: int) -> int:
    """Into how many blocks of equal size query heads over latents are cut."""
    return next(blocks for blocks in range(-(-heads // _BLOCK_HEADS), heads + 1) if heads % blocks == 0)


def _worked_with(keys_PGCD: torch.Tensor, value_dim: int, rounded: bool) -> np.generic:
    """Pairs, if queries and weights may be rounded and pages are made of whole pairs and columns; else float32."""
    page_tokens, key_dim = keys_PGCD.shape[2:]
    whole = page_tokens % 2 == 0 and key_dim % BLOCK == 0 and value_dim % BLOCK == 0
    return np.int32(0) if rounded and DOTS and keys_PGCD.dtype == torch.bfloat16 and whole else np.float32(0)


def _as_numpy(pages: torch.Tensor) -> npt.NDArray[np.generic]:
    return pages.view(torch.uint16).numpy() if pages.dtype == torch.bfloat16 else pages.numpy()


@register_jitable
def _piece_tokens(page_tokens: int) -> int:
    """Of a piece of a sequence: whole pages."""
    return max(_PIECE_TOKENS // page_tokens, 1) * page_tokens


@register_jitable
def _state_floats(rows: int, value_dim: int) -> int:
    """What the softmax of a task takes."""
    return (3 * rows + LANES - 1) // LANES * LANES + rows * ((value_dim + BLOCK - 1) // BLOCK * BLOCK)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _attend_all(  # type: ignore[no-untyped-def]
    own, threads, groups, window, query, keys, values, key_scales, value_scales, rows, queries, begins, ends,
    page_starts, page_ids, first_tasks, task_spans, first_states, scaling, cap, sinks, counters, states, floats,
    tables, out,
):  # fmt: skip
    for thread in numba.prange(threads):
        shape = _shape(own, groups, window, query, keys, values, queries, out)
        scratch = _lay_out(
            shape, floats.ctypes.data + thread * floats.shape[1] * _FLOAT,
            tables.ctypes.data + thread * tables.shape[1] * 8,
        )  # fmt: skip
        spans = _Spans(
            rows.ctypes.data, queries.ctypes.data, begins.ctypes.data, ends.ctypes.data, page_starts.ctypes.data,
            page_ids.ctypes.data, first_tasks.ctypes.data, task_spans.ctypes.data, first_states.ctypes.data,
            keys.ctypes.data, values.ctypes.data, key_scales.ctypes.data, value_scales.ctypes.data,
            len(task_spans) * groups,
        )  # fmt: skip
        _work(
            keys.dtype.type(0), own, shape, scratch, spans, query.ctypes.data, scaling, cap, sinks.ctypes.data,
            counters.ctypes.data, states.ctypes.data, out.ctypes.data,
        )  # fmt: skip


@_jit
def _work(kind, own, shape, scratch, spans, query, scaling, cap, sinks, counter, states, out):  # type: ignore[no-untyped-def]
    """Takes tasks until none is left; whoever ends the last of a span's KV head folds them and answers."""
    state_bytes = _state_floats(shape.rows, shape.value_dim) * _FLOAT
    number, asked = take_number(counter), 0
    while number < spans.tasks:
        task = _task(number, shape, spans)
        first_task = get(spans.first_tasks + 8 * task.span)
        tasks = get(spans.first_tasks + 8 * task.span + 8) - first_task
        first_state, step = scratch.state, state_bytes * shape.groups
        if tasks > 1:
            first_state = states + get(spans.first_states + 8 * task.span) * step + task.group * state_bytes
        state = _state(shape, first_state + (task.number - first_task) * step)
        row = (get(spans.rows + 8 * task.span) * shape.groups + task.group) * shape.repeat
        _take_queries(own, shape, scratch, task, query, row, scaling)
        number, asked = _attend(kind, own, shape, scratch, spans, task, cap, state, counter, asked)
        if take_number(counter + 8 * (1 + task.span * shape.groups + task.group)) + 1 == tasks:
            state = _state(shape, first_state)
            for n in range(1, tasks):
                _fold(shape, shape.repeat, state, _state(shape, first_state + n * step))
            own_sinks = sinks + task.group * shape.repeat * _FLOAT
            _answer(shape, task, state, own_sinks, out + row * shape.value_dim * _FLOAT)


@_jit
def _shape(own, groups, window, query, keys, values, queries, out):  # type: ignore[no-untyped-def]
    kv_heads, page_tokens, key_dim = keys.shape[1:]
    value_dim, repeat, most = out.shape[2], query.shape[1] // groups, 1
    for s in range(len(queries)):
        most = max(most, queries[s])
    return _Shape(
        groups, kv_heads, repeat, repeat * most, page_tokens, key_dim, value_dim, values.shape[3], keys.itemsize,
        own_size(own), (value_dim + BLOCK - 1) // BLOCK * BLOCK, window,
    )  # fmt: skip


def _scratch_floats(rows: int, key_dim: int, value_dim: int) -> int:
    """What a thread works in, as `_lay_out` cuts it."""
    x_rows = (1 + -(-key_dim // DEPTH)) * rows
    return (key_dim + DEPTH) * BLOCK + DEPTH + x_rows * X_STRIDE + 2 * _state_floats(rows, value_dim)


@_jit
def _lay_out(shape, floats, table):  # type: ignore[no-untyped-def]
    """Where in the thread's memory what lies: everything begins with a cache line."""
    flipped = floats
    panel = flipped + shape.key_dim * BLOCK * _FLOAT
    scales = panel + DEPTH * BLOCK * _FLOAT
    scores = scales + DEPTH * _FLOAT
    own = scores + shape.rows * X_STRIDE * _FLOAT
    state = own + (shape.key_dim + DEPTH - 1) // DEPTH * shape.rows * X_STRIDE * _FLOAT
    before = state + _state_floats(shape.rows, shape.value_dim) * _FLOAT
    return _Scratch(
        own, flipped, panel, scales, scores, state, before, table, table + 8 * DEPTH, table + 2 * 8 * DEPTH
    )  # fmt: skip


@_jit
def _task(number, shape, spans):  # type: ignore[no-untyped-def]
    """The task of this number."""
    number, group = number // shape.groups, number % shape.groups
    span = get(spans.task_spans + 8 * number)
    queries, high, page_tokens = get(spans.queries + 8 * span), get(spans.ends + 8 * span), shape.page_tokens
    low, end = get(spans.begins + 8 * span), high
    if queries == 1:
        piece = _piece_tokens(page_tokens)
        first = (low // piece + number - get(spans.first_tasks + 8 * span)) * piece
        low, end = max(low, first), min(high, first + piece)
    start = low // page_tokens * page_tokens
    if not _together(shape):  # nothing is softened before there is a token to see
        start += (low - start) // DEPTH * DEPTH
    return _Task(span, group, number, queries, start, end, high, get(spans.page_starts + 8 * span))


@_jit
def _place(shape, spans, task, token, pages, row_bytes):  # type: ignore[no-untyped-def]
    """The address of what pages have of a token, `row_bytes` of it."""
    page = get(spans.page_ids + 8 * (task.first_id + token // shape.page_tokens))
    kv_head = min(task.group, shape.kv_heads - 1)
    row = (page * shape.kv_heads + kv_head) * shape.page_tokens + token % shape.page_tokens
    return pages + row * row_bytes


@_jit
def _together(shape):  # type: ignore[no-untyped-def]
    """Whether whole pages fill DEPTH tokens."""
    return shape.page_tokens % LANES == 0 and DEPTH % shape.page_tokens == 0


@_jit
def _has_values(shape):  # type: ignore[no-untyped-def]
    """Of their own, which latents have not."""
    return shape.groups == shape.kv_heads and shape.value_dim == shape.value_stride


@_jit
def _state(shape, address):  # type: ignore[no-untyped-def]
    row = shape.rows * _FLOAT
    return _State(
        address, address + row, address + 2 * row, address + (3 * shape.rows + LANES - 1) // LANES * LANES * _FLOAT
    )


@_jit
def _begin(shape, rows, state):  # type: ignore[no-untyped-def]
    """Of nothing yet."""
    for r in range(rows):
        put(state.best + r * _FLOAT, np.float32(-np.inf))
        put(state.total + r * _FLOAT, np.float32(0))
    clear(state.acc, rows * shape.out_stride // LANES)


@_jit
def _take_queries(own, shape, scratch, task, query, row, scaling):  # type: ignore[no-untyped-def]
    """The task's rows, of which the first is row `row` of all queries, to where products want them."""
    for q in range(task.queries):
        for h in range(shape.repeat):
            source = query + (row + q * shape.groups * shape.repeat + h) * shape.key_dim * _FLOAT
            to = scratch.own + (q * shape.repeat + h) * X_STRIDE * _FLOAT
            for d in range(0, shape.key_dim, DEPTH):
                some = min(DEPTH, shape.key_dim - d)
                place = to + d // DEPTH * shape.rows * X_STRIDE * _FLOAT
                take_scaled(own, source + d * _FLOAT, some, scaling, place)


@_jit
def _fold(shape, rows, state, more):  # type: ignore[no-untyped-def]
    """`state` becomes that of its own tokens and of those of `more`, which follow them."""
    for r in range(rows):
        own, other = get_float(state.best + r * _FLOAT), get_float(more.best + r * _FLOAT)
        if other == -np.inf:  # the row sees none of them
            continue
        top = max(own, other)
        factor = np.float32(math.exp(other - top))
        kept = np.float32(math.exp(own - top))
        total = kept * get_float(state.total + r * _FLOAT)
        put(state.shrink + r * _FLOAT, kept)
        put(state.best + r * _FLOAT, top)
        put(state.total + r * _FLOAT, total + factor * get_float(more.total + r * _FLOAT))
        acc = state.acc + r * shape.out_stride * _FLOAT
        scale(acc, shape.out_stride // LANES, state.shrink + r * _FLOAT)
        add_scaled(more.acc + r * shape.out_stride * _FLOAT, shape.out_stride, factor, acc)


@_jit
def _answer(shape, task, state, sinks, out):  # type: ignore[no-untyped-def]
    """Each row's weighted values over the sum of its weights and of its head's sink."""
    for q in range(task.queries):
        for h in range(shape.repeat):
            r = q * shape.repeat + h
            best, sink = get_float(state.best + r * _FLOAT), get_float(sinks + h * _FLOAT)
            factor = np.float32(1)
            sum_ = get_float(state.total + r * _FLOAT)
            if sink > -np.inf:  # exponentials count where sequences are short
                top = max(best, sink)
                factor = np.float32(math.exp(best - top))
                sum_ = factor * sum_ + np.float32(math.exp(sink - top))
            to = out + (q * shape.groups * shape.repeat + h) * shape.value_dim * _FLOAT
            take_scaled(np.float32(0), state.acc + r * shape.out_stride * _FLOAT, shape.value_dim, factor / sum_, to)


@_jit
def _attend(kind, own, shape, scratch, spans, task, cap, state, counter, asked):  # type: ignore[no-untyped-def]
    """Works through a task, block by block; returns the number of the thread's next one, and how far its keys were
    asked for, as those of this one were up to the token `asked`.

    Memory is busy all the time: while a block's keys are scored its values are on their way, and while its values are
    added as many keys, a block ahead of those that are scored: of this task and then of the next one.
    """
    all_rows, piece = task.queries * shape.repeat, _piece_tokens(shape.page_tokens)
    _begin(shape, all_rows, state)
    key_bytes, value_bytes = shape.key_dim * shape.size, shape.value_stride * shape.size
    before, folded = _state(shape, scratch.before), False
    start = task.start
    ahead = _Ahead(-1, task, max(asked, _block_end(shape, start, task.end)))
    while start < task.end:
        if start % piece == 0 and start > task.start:
            if not folded:
                _begin(shape, all_rows, before)
            _fold(shape, all_rows, before, state)
            _begin(shape, all_rows, state)
            folded = True
        stop = _block_end(shape, start, task.end)
        for token in range(start, stop, BLOCK):
            half = min(token + LANES, stop - 1)  # it may begin another page
            key = _place(shape, spans, task, token, spans.keys, key_bytes)
            half_key = _place(shape, spans, task, half, spans.keys, key_bytes)
            value = token if _has_values(shape) else min(token + BLOCK, task.end - 1)
            half_value = min(value + LANES, task.end - 1)
            put(scratch.aheads, _place(shape, spans, task, value, spans.values, value_bytes))
            put(scratch.aheads + 8, _place(shape, spans, task, half_value, spans.values, value_bytes))
            rows = _rows(shape, task, token, min(token + BLOCK, stop))
            _score(kind, own, shape, scratch, rows, key, half_key, min(stop - token, BLOCK), token - start)
        rows = _rows(shape, task, start, stop)
        if shape.size == 1:
            _scale_columns(shape, scratch, spans, task, rows, start, stop, spans.key_scales)
        _soften(own, shape, scratch, task, rows, start, stop, cap, state)
        if shape.size == 1:
            _scale_columns(shape, scratch, spans, task, rows, start, stop, spans.value_scales)
        ahead = _list_panels(shape, scratch, spans, task, start, stop, ahead, counter)
        _add_values(kind, own, shape, scratch, rows, stop - start, _panel_rows(shape), state.acc)
        start = stop
    if folded:
        _fold(shape, all_rows, before, state)
        _begin(shape, all_rows, state)
        _fold(shape, all_rows, state, before)
    return ahead.number, ahead.token


@_jit
def _list_panels(shape, scratch, spans, task, start, stop, ahead, counter):  # type: ignore[no-untyped-def]
    """Where the values of the tokens `start` to `stop` lie, panel by panel, and which keys are asked for beside each,
    into the tables; how far keys are asked for then."""
    number, then, asked = ahead
    rows, key_bytes, value_bytes = (
        _panel_rows(shape), shape.key_dim * shape.size, shape.value_stride * shape.size
    )  # fmt: skip
    if number < 0:  # after a first block that was short
        asked = max(asked, stop)
    for n in range((stop - start + rows - 1) // rows):
        if asked >= then.end and number < 0:
            number = take_number(counter)
            then = _task(min(number, spans.tasks - 1), shape, spans)
            asked = then.start
        token = min(asked, then.end - 1)
        put(scratch.panels + n * 8, _place(shape, spans, task, start + n * rows, spans.values, value_bytes))
        put(scratch.aheads + n * 8, _place(shape, spans, then, token, spans.keys, key_bytes))
        fetch(_place(shape, spans, then, token, spans.values, value_bytes), 1)
        fetch(_place(shape, spans, then, min(token + DEPTH, then.end - 1), spans.keys, key_bytes), 1)
        _fetch_scales(shape, spans, then, token, rows)
        if start + (n + 1) * rows <= stop:  # a short panel's time is enough for a part
            asked = _after_panel(shape, asked)
    if stop == task.end:  # the next task may begin with more than this one left time to ask for
        while asked < _block_end(shape, then.start, then.end):
            fetch(_place(shape, spans, then, asked, spans.keys, key_bytes), rows * key_bytes)
            _fetch_scales(shape, spans, then, asked, rows)
            asked = _after_panel(shape, asked)
    return _Ahead(number, then, asked)


@_jit
def _panel_rows(shape):  # type: ignore[no-untyped-def]
    """Tokens of a page, or of a part of it, whose values are a panel of a product."""
    return min(shape.page_tokens, DEPTH)


@_jit
def _after_panel(shape, token):  # type: ignore[no-untyped-def]
    """Where the panel after the one that begins with `token` begins: with a page, if not in one."""
    page_end = token // shape.page_tokens * shape.page_tokens + shape.page_tokens
    return min(token + _panel_rows(shape), page_end)


@_jit
def _fetch_scales(shape, spans, task, token, tokens):  # type: ignore[no-untyped-def]
    """Of codes: those of keys and of values are few, and asked for together."""
    if shape.size == 1:
        fetch(_place(shape, spans, task, token, spans.key_scales, _FLOAT), tokens * _FLOAT)
        fetch(_place(shape, spans, task, token, spans.value_scales, _FLOAT), tokens * _FLOAT)


@_jit
def _block_end(shape, start, end):  # type: ignore[no-untyped-def]
    """At most DEPTH tokens make a block, several whole pages or a part of one; from fixed tokens of the sequence on."""
    whole = DEPTH if _together(shape) else shape.page_tokens
    return min(start // whole * whole + start % whole // DEPTH * DEPTH + DEPTH, (start // whole + 1) * whole, end)


@_jit
def _rows(shape, task, start, stop):  # type: ignore[no-untyped-def]
    """Those that see one of the tokens `start` to before `stop`: their queries are not before, and not too far on."""
    position = task.high - task.queries  # of the first query
    first = max(start - position, 0)
    end = min(task.queries, max(stop - position + shape.window - 1, first))
    rows = (end - first) * shape.repeat
    tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
    return _Rows(first, end, (rows + tiles - 1) // max(tiles, 1))


@_jit
def _score(kind, own, shape, scratch, rows, key, half_key, tokens, column):  # type: ignore[no-untyped-def]
    """`scores[r, column + c] = own[r] . key[c]` for at most BLOCK tokens c, LANES of which lie at each address.

    As many values are prefetched at the first two addresses in the table `aheads`.
    """
    _flip(kind, own, shape, key, half_key, tokens, scratch.flipped)
    ahead_stride = BLOCK * shape.value_stride * shape.size // shape.key_dim
    for d in range(0, shape.key_dim, DEPTH):
        depth = min(DEPTH, shape.key_dim - d)
        half = (depth + 1) // 2  # beside one half of the elements go the values of LANES tokens
        put(scratch.panels, scratch.flipped + d * BLOCK * shape.own_size)
        put(scratch.panels + 8, scratch.flipped + (d + half) * BLOCK * shape.own_size)
        for r in range(rows.first * shape.repeat, rows.end * shape.repeat, rows.tile):
            product(
                own, own, kind, d == 0, min(rows.tile, rows.end * shape.repeat - r), depth,
                scratch.own + (d // DEPTH * shape.rows + r) * X_STRIDE * _FLOAT,
                scratch.panels, half, 0, BLOCK, scratch.aheads, d // 2 * ahead_stride, ahead_stride,
                scratch.scores + (r * X_STRIDE + column) * _FLOAT, X_STRIDE,
            )  # fmt: skip


@_jit
def _flip(kind, own, shape, key, half_key, tokens, flipped):  # type: ignore[no-untyped-def]
    """`flipped[d, c] = key[min(c, tokens - 1), d]` for BLOCK columns c (or garbage in columns >= tokens)."""
    dim, size = shape.key_dim, shape.size
    width = LANES * _FLOAT // size  # elements of LANES words
    whole = dim - dim % width  # all, where they are to be pairs
    for half in range(2):
        source = half_key if half else key
        last = min(max(tokens - half * LANES, 1), LANES) - 1
        for d in range(0, whole, width):
            to = flipped + d * BLOCK * shape.own_size + half * LANES * _FLOAT
            transpose(kind, own, source + d * size, dim, last, to, BLOCK)
        for d in range(whole, dim):
            for c in range(last + 1):
                to = flipped + (d * BLOCK + half * LANES + c) * _FLOAT
                widen(kind, source + (c * dim + d) * size, to)


@_jit
def _scale_columns(shape, scratch, spans, task, rows, start, stop, scales):  # type: ignore[no-untyped-def]
    """`scores[r, c] *= scale[c]` for the tokens from `start` to `stop`; columns beyond them stay garbage, or 0."""
    token = start
    while token < stop:
        count = min(shape.page_tokens - token % shape.page_tokens, stop - token)
        place = _place(shape, spans, task, token, scales, _FLOAT)
        take_scaled(np.float32(0), place, count, np.float32(1), scratch.scales + (token - start) * _FLOAT)
        token += count
    vectors = (stop - start + LANES - 1) // LANES
    for r in range(rows.first * shape.repeat, rows.end * shape.repeat):
        multiply(scratch.scores + r * X_STRIDE * _FLOAT, vectors, scratch.scales)


@_jit
def _soften(own, shape, scratch, task, rows, start, stop, cap, state):  # type: ignore[no-untyped-def]
    """Scores of the tokens become weights; what was summed before shrinks to the new maximum."""
    vectors = (stop - start + BLOCK - 1) // BLOCK * 2
    if cap > 0:
        for r in range(rows.first * shape.repeat, rows.end * shape.repeat):
            softcap(scratch.scores + r * X_STRIDE * _FLOAT, vectors, cap)
    queries = SOFT_ROWS if shape.repeat == 1 else 1  # at once
    for q in range(rows.first, rows.end, queries):
        high = task.high - task.queries + q + 1 - start
        low, beyond = high - shape.window, min(high, stop - start)
        for h in range(0, shape.repeat, SOFT_ROWS):
            r = q * shape.repeat + h
            row, here = scratch.scores + r * X_STRIDE * _FLOAT, r * _FLOAT
            best, total, shrink = state.best + here, state.total + here, state.shrink + here
            if shape.repeat > 1:
                soften(own, min(SOFT_ROWS, shape.repeat - h), row, vectors, low, beyond, best, total, shrink)
            else:
                count = min(queries, rows.end - q)
                soften_queries(own, count, row, vectors, low, high, stop - start, best, total, shrink)
    for r in range(rows.first * shape.repeat, rows.end * shape.repeat):
        if get_float(state.shrink + r * _FLOAT) != 1:
            scale(state.acc + r * shape.out_stride * _FLOAT, shape.out_stride // LANES, state.shrink + r * _FLOAT)


@_jit
def _add_values(kind, own, shape, scratch, rows, tokens, panel_rows, acc):  # type: ignore[no-untyped-def]
    """`acc[r] += sum over c < tokens of weights[r, c] * value[c]`, for the values at the addresses in the table.

    They are copied, as what is worked with, where they fill no whole vectors and where several tiles of rows meet them.
    """
    dim, first, end = shape.value_dim, rows.first * shape.repeat, rows.end * shape.repeat
    tiles = (end - first + rows.tile - 1) // max(rows.tile, 1)
    ahead_stride = BLOCK * shape.key_dim * shape.size // (max(dim - dim % BLOCK, BLOCK) * max(tiles, 1))
    for d in range(0, dim, BLOCK):
        columns = min(BLOCK, dim - d)
        copied = columns < BLOCK or tiles > 1
        if copied:
            _copy_columns(kind, own, shape, scratch, tokens, panel_rows, d, columns)
        for n in range(tiles):
            r = first + n * rows.tile
            count, weights = min(rows.tile, end - r), scratch.scores + r * X_STRIDE * _FLOAT
            ahead = (d // BLOCK * tiles + n) * panel_rows * ahead_stride
            to = acc + (r * shape.out_stride + d) * _FLOAT
            if copied:
                product(
                    own, own, kind, 0, count, tokens, weights, scratch.copies, panel_rows, 0, BLOCK,
                    scratch.aheads, ahead, ahead_stride, to, shape.out_stride,
                )  # fmt: skip
            else:
                product(
                    kind, own, kind, 0, count, tokens, weights, scratch.panels, panel_rows, d * shape.size,
                    shape.value_stride, scratch.aheads, ahead, ahead_stride, to, shape.out_stride,
                )  # fmt: skip


@_jit
def _copy_columns(kind, own, shape, scratch, tokens, panel_rows, first, columns):  # type: ignore[no-untyped-def]
    """`panel[c, i] = value[c, first + i]` for `columns` of the tokens' values, and where its pieces begin."""
    step = _FLOAT // shape.own_size  # a pair is of two tokens
    for c in range(0, tokens, step):
        place = scratch.panel + c * BLOCK * shape.own_size
        if c % panel_rows == 0:
            put(scratch.copies + c // panel_rows * 8, place)
        value = get(scratch.panels + c // panel_rows * 8)
        value += (c % panel_rows * shape.value_stride + first) * shape.size
        if step == 2:
            pair_block(value, value + (shape.value_stride * shape.size if c + 1 < tokens else 0), place)
        elif columns == BLOCK:
            widen_block(kind, value, place)
        else:
            for i in range(columns):
                widen(kind, value + i * shape.size, place + i * _FLOAT)

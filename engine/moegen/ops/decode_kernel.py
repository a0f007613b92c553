"""Decode attention on the CPU: one query per sequence, keys and values read once, in place, page by page.

Compiled with Numba at first use (and cached on disk), so that installing needs no compiler. Pages are float32 or
bfloat16; arithmetic is float32. Each task is one sequence and one KV head: all R query heads of the group meet a page
while it is in cache. The softmax subtracts the running maximum (Milakov & Gimelshein 2018, "Online normalizer
calculation for softmax"), applied per page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numba.extending
import numpy as np
import torch

from moegen.schedule.step import Ints, Span

if TYPE_CHECKING:
    from moegen.ops.attention import AttentionRule

_KV_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class DecodeSpans:
    """Spans of one query each, as arrays: `page_ids[page_starts[s] : page_starts[s + 1]]` are the pages of span s."""

    rows: Ints  # [S] the query's index in the batch
    kv_lengths: Ints  # [S]
    page_starts: Ints  # [S + 1]
    page_ids: Ints

    @classmethod
    def of(cls, spans: Sequence[Span]) -> DecodeSpans:
        starts = np.zeros(len(spans) + 1, np.int64)
        np.cumsum([len(span.pages) for span in spans], out=starts[1:])
        return cls(
            np.array([span.first for span in spans], np.int64),
            np.array([span.kv_length for span in spans], np.int64),
            starts,
            np.array([page for span in spans for page in span.pages], np.int64),
        )


def kernel_reads(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the kernel can serve these tensors; otherwise the torch way does."""
    return query.device.type == "cpu" and keys.device.type == "cpu" and keys.dtype in _KV_DTYPES


def decode_attention(
    query_THD: torch.Tensor,
    keys_PGCD: torch.Tensor,
    values_PGCD: torch.Tensor,
    spans: DecodeSpans,
    rule: AttentionRule,
    out_THD: torch.Tensor,
) -> None:
    """Writes the attention of each span's query into its row of `out_THD`."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    query = query_THD.float().contiguous()
    out = query.new_empty(len(spans.rows), query.shape[1], values_PGCD.shape[-1])
    sinks = np.empty(0, np.float32) if rule.sinks_H is None else rule.sinks_H.float().numpy()
    _decode(
        query.numpy(),
        _as_numpy(keys_PGCD),
        _as_numpy(values_PGCD),
        spans.rows,
        spans.kv_lengths,
        spans.page_starts,
        spans.page_ids,
        np.float32(rule.scaling),
        np.int64(rule.sliding_window or 0),
        sinks,
        np.float32(rule.softcap or 0),
        out.numpy(),
    )
    torch.set_num_threads(threads)  # Numba and torch share one OpenMP, and starting Numba's threads resets the number
    out_THD[torch.from_numpy(spans.rows)] = out.to(out_THD.dtype)


def _as_numpy(pages: torch.Tensor) -> np.ndarray:
    return pages.view(torch.uint16).numpy() if pages.dtype == torch.bfloat16 else pages.numpy()


def _float32(page, scratch):  # type: ignore[no-untyped-def]
    """A page as float32: itself, or its bfloat16 widened into `scratch` (compiled; see the overload)."""
    raise NotImplementedError


@numba.extending.overload(_float32, inline="always")
def _float32_by_dtype(page, scratch):  # type: ignore[no-untyped-def]
    if page.dtype == numba.float32:
        return lambda page, scratch: page

    def widen(page, scratch):  # type: ignore[no-untyped-def]
        bits = scratch.view(np.uint32)  # a bfloat16 is the upper half of a float32
        for i in range(page.shape[0]):
            for j in range(page.shape[1]):
                bits[i, j] = np.uint32(page[i, j]) << np.uint32(16)
        return scratch

    return widen


_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; infinities stay infinities


@numba.njit(fastmath=_FASTMATH, inline="always", error_model="numpy")
def _dots(query, key, row, tokens):  # type: ignore[no-untyped-def]
    """`row[r, c] = query[r] . key[c]`, four query heads at a time: sums stay in registers, a key is loaded once."""
    repeat, dim = query.shape
    for c in range(tokens):
        for block in range(repeat // 4):
            r = block * 4
            a0 = a1 = a2 = a3 = np.float32(0)
            for d in range(dim):
                k = key[c, d]
                a0 += query[r, d] * k
                a1 += query[r + 1, d] * k
                a2 += query[r + 2, d] * k
                a3 += query[r + 3, d] * k
            row[r, c], row[r + 1, c], row[r + 2, c], row[r + 3, c] = a0, a1, a2, a3
        for r in range(repeat // 4 * 4, repeat):
            a0 = np.float32(0)
            for d in range(dim):
                a0 += query[r, d] * key[c, d]
            row[r, c] = a0


@numba.njit(fastmath=_FASTMATH, inline="always", error_model="numpy")
def _add_weighted(weight, value, out, tokens):  # type: ignore[no-untyped-def]
    """`out[d] += sum over c of weight[c] * value[c, d]`, eight tokens to each load and store of `out`."""
    dim = out.shape[0]
    for block in range(tokens // 8):
        c = block * 8
        w0, w1, w2, w3 = weight[c], weight[c + 1], weight[c + 2], weight[c + 3]
        w4, w5, w6, w7 = weight[c + 4], weight[c + 5], weight[c + 6], weight[c + 7]
        for d in range(dim):
            out[d] += (
                w0 * value[c, d]
                + w1 * value[c + 1, d]
                + w2 * value[c + 2, d]
                + w3 * value[c + 3, d]
                + w4 * value[c + 4, d]
                + w5 * value[c + 5, d]
                + w6 * value[c + 6, d]
                + w7 * value[c + 7, d]
            )
    for c in range(tokens // 8 * 8, tokens):
        w0 = weight[c]
        for d in range(dim):
            out[d] += w0 * value[c, d]


@numba.njit(parallel=True, fastmath=_FASTMATH, cache=True, error_model="numpy")
def _decode(query, keys, values, rows, lengths, starts, page_ids, scaling, window, sinks, softcap, out):  # type: ignore[no-untyped-def]
    _, groups, page_tokens, key_dim = keys.shape
    value_dim = values.shape[3]
    repeat = query.shape[1] // groups
    for task in numba.prange(rows.shape[0] * groups):
        span, group = task // groups, task % groups
        length = lengths[span]
        begin = max(length - window, 0) if window > 0 else 0
        best = np.full(repeat, np.float32(-np.inf), np.float32)
        total = np.zeros(repeat, np.float32)
        acc = np.zeros((repeat, value_dim), np.float32)
        scores = np.empty((repeat, page_tokens), np.float32)
        key_scratch = np.empty((page_tokens, key_dim), np.float32)
        value_scratch = np.empty((page_tokens, value_dim), np.float32)
        own = query[rows[span], group * repeat : (group + 1) * repeat] * scaling
        if sinks.shape[0] > 0:
            for r in range(repeat):
                best[r] = sinks[group * repeat + r]
                total[r] = 1
        for page in range(begin // page_tokens, (length + page_tokens - 1) // page_tokens):
            where = page_ids[starts[span] + page]
            key = _float32(keys[where, group], key_scratch)
            value = _float32(values[where, group], value_scratch)
            tokens = min(length - page * page_tokens, page_tokens)
            _dots(own, key, scores, tokens)
            for r in range(repeat):
                row = scores[r]
                if softcap > 0:
                    for c in range(tokens):
                        row[c] = softcap * math.tanh(row[c] / softcap)
                for c in range(begin - page * page_tokens):
                    row[c] = -np.inf
                top = best[r]
                for c in range(tokens):
                    top = max(top, row[c])
                shrink = np.float32(math.exp(best[r] - top))
                best[r] = top
                sum_ = np.float32(0)
                for c in range(tokens):
                    row[c] = np.float32(math.exp(row[c] - top))
                    sum_ += row[c]
                total[r] = total[r] * shrink + sum_
                for d in range(value_dim):
                    acc[r, d] *= shrink
                _add_weighted(row, value, acc[r], tokens)
        for r in range(repeat):
            for d in range(value_dim):
                out[span, group * repeat + r, d] = acc[r, d] / total[r]

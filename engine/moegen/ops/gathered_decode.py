"""Decode attention of many sequences at once, over keys and values gathered from their pages.

For devices that ask for few large pieces of work rather than one per sequence. Sequences are taken in order of length,
as many together as `_GATHERED_BYTES` allow, padded to the longest of them. What no query sees is set to 0 and masked:
memory that nothing was written to may hold what is not even a number.

Shape suffixes: S spans, H query heads, G KV heads, R = H / G, P pages of a span, C tokens per page, L = P * C, D dim,
N pages gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from moegen.schedule.step import Ints, QuerySpans

if TYPE_CHECKING:
    from moegen.ops.attention import AttentionRule

_GATHERED_BYTES = 64 << 20  # keys and values that are gathered at once, about
_MASKED = float("-inf")

Gather = Callable[[Ints], tuple[torch.Tensor, torch.Tensor]]
"""Page ids `[N]` -> copies of their keys and values on the device, `[N, G, C, D]` each."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Spans that are gathered together."""

    rows: Ints  # [S] of the queries
    page_ids_SP: Ints
    first_S: Ints  # the first key that each query sees, counted from the first gathered page
    end_S: Ints  # and the one after the last


def gathered_decode(
    query_THD: torch.Tensor,
    gather: Gather,
    page_bytes: int,
    page_tokens: int,
    spans: QuerySpans,
    rule: AttentionRule,
    out_THD: torch.Tensor,
) -> None:
    """Writes the attention of each span's query into its row of `out_THD`; `page_bytes` are of keys and values."""
    for bucket in _buckets(spans, page_tokens, rule.sliding_window, max(_GATHERED_BYTES // page_bytes, 1)):
        rows_S = torch.from_numpy(bucket.rows).to(query_THD.device)
        seen_SL = _seen(bucket, bucket.page_ids_SP.shape[1] * page_tokens, query_THD.device)
        keys_SGLD, values_SGLD = (
            _in_sequence(pages, *bucket.page_ids_SP.shape)
            .to(query_THD.dtype)
            .masked_fill_(~seen_SL[:, None, :, None], 0)
            for pages in gather(bucket.page_ids_SP.reshape(-1))
        )
        out_THD[rows_S] = _attend(query_THD[rows_S], keys_SGLD, values_SGLD, seen_SL, rule)


def _buckets(spans: QuerySpans, page_tokens: int, window: int | None, most_pages: int) -> Iterator[_Bucket]:
    """Of at most `most_pages` pages, padding counted, or of one span."""
    begins = np.maximum(spans.kv_lengths - window, 0) if window else 0 * spans.kv_lengths
    first_pages = begins // page_tokens
    pages = -(-spans.kv_lengths // page_tokens) - first_pages
    order = np.argsort(-pages, kind="stable")
    at = 0
    while at < len(order):
        longest = int(pages[order[at]])
        own = order[at : at + max(most_pages // longest, 1)]
        starts = spans.page_starts[own] + first_pages[own]
        within = np.minimum(np.arange(longest), pages[own, None] - 1)  # beyond its last page, that one again
        first_token = first_pages[own] * page_tokens
        yield _Bucket(
            spans.rows[own],
            spans.page_ids[starts[:, None] + within],
            begins[own] - first_token,
            spans.kv_lengths[own] - first_token,
        )
        at += len(own)


def _in_sequence(pages_NGCD: torch.Tensor, spans: int, pages: int) -> torch.Tensor:
    """`[S, G, L, D]`"""
    return pages_NGCD.unflatten(0, (spans, pages)).transpose(1, 2).flatten(2, 3)


def _seen(bucket: _Bucket, length: int, device: torch.device) -> torch.Tensor:
    bounds_2S = torch.from_numpy(np.stack([bucket.first_S, bucket.end_S])).to(device)
    key_L = torch.arange(length, device=device)
    return (key_L >= bounds_2S[0, :, None]) & (key_L < bounds_2S[1, :, None])


def _attend(
    query_SHD: torch.Tensor, keys_SGLD: torch.Tensor, values_SGLD: torch.Tensor, seen_SL: torch.Tensor,
    rule: AttentionRule,
) -> torch.Tensor:  # fmt: skip
    query_SGRD = query_SHD.unflatten(1, (keys_SGLD.shape[1], -1))
    seen_S11L = seen_SL[:, None, None]
    if rule.sinks_H is None and rule.softcap is None:
        out_SGRD = F.scaled_dot_product_attention(
            query_SGRD, keys_SGLD, values_SGLD, attn_mask=seen_S11L, scale=rule.scaling
        )
        return out_SGRD.flatten(1, 2)
    scores_SGRL = (query_SGRD.float() @ keys_SGLD.float().transpose(2, 3)) * rule.scaling
    if rule.softcap is not None:
        scores_SGRL = rule.softcap * torch.tanh(scores_SGRL / rule.softcap)
    scores_SGRL = scores_SGRL.masked_fill(~seen_S11L, _MASKED)
    if rule.sinks_H is not None:
        sinks_GR1 = rule.sinks_H.float().view(*query_SGRD.shape[1:3], 1)
        scores_SGRL = torch.cat([scores_SGRL, sinks_GR1.expand(*scores_SGRL.shape[:3], 1)], dim=-1)
    weights_SGRL = scores_SGRL.softmax(dim=-1)[..., : keys_SGLD.shape[2]]
    return (weights_SGRL @ values_SGLD.float()).flatten(1, 2).to(query_SHD.dtype)

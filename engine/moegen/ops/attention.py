"""Attention over paged keys and values: causal, grouped heads, sliding window, sinks, soft cap.

Shape suffixes: T tokens of the batch, H query heads, G KV heads, R = H / G query heads per KV head, L keys, D head dim.

`paged_attention` is the one entry where pages and queries are in the same memory (`moegen.ops.hosted_attention` is that
where they are not). On a CPU a compiled kernel reads the pages in place; on other devices decode spans (one query) are
gathered and attended many at once; everything else gathers a sequence's pages and uses torch. The torch way, sequence
by sequence, is the oracle of the others. Over latents (`rule.latent`) there is one KV head: decode absorbs queries
before and lifts answers after; prompts go the torch way, where their heads may be expanded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from moegen.ops.gathered_decode import gathered_decode
from moegen.ops.kv_pages import LayerPages
from moegen.ops.latent_heads import LatentHeads
from moegen.ops.paged_kernel import attend_pages, kernel_reads
from moegen.schedule.step import AttentionBatch, QuerySpans, Span

# The fp32 score matrix of one sequence is cut by query rows so that it stays near this size.
_SCORE_ELEMENTS = 1 << 24
# The query heads of a group share keys and values by a stride of 0, which torch's own kernels read; what cuDNN's, which
# some GPUs prefer, make of it is not known.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How scores become weights, as the model's attention module states it."""

    scaling: float
    sliding_window: int | None = None  # a query sees itself and the `sliding_window - 1` tokens before it
    sinks_H: torch.Tensor | None = None  # a learned logit per head that takes part in the softmax with no value
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    latent: LatentHeads | None = None  # keys are latents, of which the heads are made
    chosen_TK: torch.Tensor | None = None  # positions that each query sees, of those at or before it; None: all

    def first_key(self, query: int, page_tokens: int) -> int:
        """The first token of the earliest page that a query at position `query` can see."""
        if self.sliding_window is None:
            return 0
        return max(query - self.sliding_window + 1, 0) // page_tokens * page_tokens

    def value_dim(self, values: torch.Tensor) -> int:
        """Of the answers to queries, where `values` are what is kept."""
        return values.shape[-1] if self.latent is None else self.latent.value_dim


def paged_attention(
    query_THD: torch.Tensor,
    pages: LayerPages,
    batch: AttentionBatch,
    rule: AttentionRule,
    *,
    new: Sequence[torch.Tensor] | None = None,
    use_kernel: bool = True,
    rounded: bool = False,
) -> torch.Tensor:
    """Attention of every token of `batch` over its own sequence's pages -> `[T, H, value_dim]`.

    Args:
        new: what the pages keep of the batch's own tokens (`LayerPages.kept`): spans that begin their sequence need no
            more.
        rounded: the CPU's kernel may round queries and weights to bfloat16 where they meet pages of that dtype; not
            over latents, whose prompts do not go through it.
    """
    out_THD = query_THD.new_empty(*query_THD.shape[:2], rule.value_dim(pages.values_PGCD))
    reads = kernel_reads(query_THD, pages.keys_PGCD)
    use_kernel = use_kernel and rule.chosen_TK is None
    rest: Sequence[Span] = batch.spans
    if use_kernel and (reads or query_THD.device.type != "cpu"):
        rounded = rounded and rule.latent is None
        _attend_decode(query_THD, pages, batch.decode, rule, reads, rounded, out_THD)
        rest = batch.prefill
        if reads and rule.latent is None:
            if rest:
                attend_pages(query_THD, pages, batch.prompts, rule, out_THD, rounded=rounded)
            return out_THD
    for span in rest:
        own = slice(span.first, span.first + span.length)
        if new is not None and span.length == span.kv_length:
            first = 0
            keys_GLD, values_GLD = (x.transpose(0, 1) for x in pages.pair([kept[own] for kept in new]))
        else:
            first = rule.first_key(span.kv_length - span.length, pages.page_tokens)
            keys_GLD, values_GLD = pages.gather(span, first)
        own_rule = rule if rule.chosen_TK is None else replace(rule, chosen_TK=rule.chosen_TK[own])
        out_THD[own] = span_attention(query_THD[own], keys_GLD, values_GLD, first, span, own_rule)
    return out_THD


def _attend_decode(
    query_THD: torch.Tensor, pages: LayerPages, spans: QuerySpans, rule: AttentionRule, reads: bool,
    rounded: bool, out_THD: torch.Tensor,
) -> None:  # fmt: skip
    """By the kernel, where it `reads` these pages, or over gathered ones."""

    def decode(query_THD: torch.Tensor, spans: QuerySpans, rule: AttentionRule, out_THD: torch.Tensor) -> None:
        if reads:
            attend_pages(query_THD, pages, spans, rule, out_THD, rounded=rounded)
        else:
            gathered_decode(query_THD, pages.rows, pages.gathered_bytes, pages.page_tokens, spans, rule, out_THD)

    if len(spans.rows):
        absorbed_decode(decode, query_THD, pages.keys_PGCD.shape[-1], spans, rule, out_THD)


Decode = Callable[[torch.Tensor, QuerySpans, AttentionRule, torch.Tensor], None]
"""Writes the attention of each span's query into its row of the last argument."""


def absorbed_decode(
    decode: Decode, query_THD: torch.Tensor, key_dim: int, spans: QuerySpans, rule: AttentionRule,
    out_THD: torch.Tensor,
) -> None:  # fmt: skip
    """`decode` itself, or over latents `key_dim` wide: some spans at a time, absorbed for it and lifted after it."""
    if rule.latent is None:
        return decode(query_THD, spans, rule, out_THD)
    plain = replace(rule, latent=None)
    some = rule.latent.absorbed(len(spans.rows), key_dim)
    for first in range(0, len(spans.rows), some):
        part = spans.part(first, min(first + some, len(spans.rows)))
        rows_S = torch.from_numpy(part.rows).to(query_THD.device)
        query_SHW = rule.latent.absorb(query_THD[rows_S])
        latent_SHR = query_SHW.new_empty(*query_SHW.shape[:2], rule.latent.rank)
        decode(query_SHW, replace(part, rows=np.arange(len(part.rows))), plain, latent_SHR)
        out_THD[rows_S] = rule.latent.lift(latent_SHR).to(out_THD.dtype)
    return None


def span_attention(
    query_THD: torch.Tensor, keys_GLD: torch.Tensor, values_GLD: torch.Tensor, first: int, span: Span,
    rule: AttentionRule,
) -> torch.Tensor:  # fmt: skip
    """Attention of one span over its sequence's keys from token `first` to the span's last -> `[T, H, value_dim]`."""
    if rule.latent is not None:
        plain_rule = replace(rule, latent=None)
        if rule.sinks_H is not None:  # one per head, so all heads at once
            kept_1LW = keys_GLD.to(query_THD)
            latent_1LR = kept_1LW[..., : rule.latent.rank]
            return rule.latent.lift(
                span_attention(rule.latent.absorb(query_THD), kept_1LW, latent_1LR, first, span, plain_rule)
            )
        return rule.latent.attend_span(
            query_THD, keys_GLD[0].to(query_THD), lambda q, k, v: span_attention(q, k, v, first, span, plain_rule)
        )
    position = span.kv_length - span.length  # of the span's first query
    keys_GLD, values_GLD = keys_GLD.to(query_THD), values_GLD.to(query_THD)
    plain = rule.sinks_H is None and rule.softcap is None
    every_earlier = rule.chosen_TK is None and (rule.sliding_window or span.length) >= span.length
    if plain and every_earlier and span.length == span.kv_length:
        return _sdpa(query_THD, keys_GLD, values_GLD, rule.scaling, None)
    heads, length = query_THD.shape[1], keys_GLD.shape[1]
    rows = max(1, _SCORE_ELEMENTS // (heads * length))
    outs = []
    for start in range(0, span.length, rows):
        query_RHD = query_THD[start : start + rows]
        mask_TL = _visible(position + start - first, query_RHD.shape[0], length, rule.sliding_window, query_THD.device)
        if rule.chosen_TK is not None:
            mask_TL &= _chosen(rule.chosen_TK[start : start + rows] - first, length)
        if plain:
            outs.append(_sdpa(query_RHD, keys_GLD, values_GLD, rule.scaling, mask_TL))
        else:
            outs.append(_softmax_attention(query_RHD, keys_GLD, values_GLD, rule, mask_TL))
    return torch.cat(outs)


def _visible(position: int, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[T, L]` bool: which keys (positions 0 .. L - 1) the queries at `position ..` may see."""
    query_T1 = torch.arange(position, position + queries, device=device)[:, None]
    key_L = torch.arange(keys, device=device)
    mask_TL = key_L <= query_T1
    return mask_TL if window is None else mask_TL & (key_L > query_T1 - window)


def _chosen(places_TK: torch.Tensor, keys: int) -> torch.Tensor:
    """`[T, L]` bool: which keys are among each query's places."""
    return torch.zeros(len(places_TK), keys, dtype=torch.bool, device=places_TK.device).scatter(1, places_TK, True)


def _sdpa(
    query_THD: torch.Tensor,
    keys_GLD: torch.Tensor,
    values_GLD: torch.Tensor,
    scaling: float,
    mask_TL: torch.Tensor | None,
) -> torch.Tensor:
    """The query heads of a KV head are the heads of one batch entry: each sees the same K and V, none is copied.

    `enable_gqa` is far slower on CPUs.
    """
    query_GRTD = query_THD.unflatten(1, (keys_GLD.shape[0], -1)).permute(1, 2, 0, 3)
    keys_GRLD, values_GRLD = (x[:, None].expand(-1, query_GRTD.shape[1], -1, -1) for x in (keys_GLD, values_GLD))
    out_GRTD = F.scaled_dot_product_attention(
        query_GRTD, keys_GRLD, values_GRLD, attn_mask=mask_TL, is_causal=mask_TL is None, scale=scaling
    )
    return out_GRTD.permute(2, 0, 1, 3).flatten(1, 2)


def _softmax_attention(
    query_THD: torch.Tensor,
    keys_GLD: torch.Tensor,
    values_GLD: torch.Tensor,
    rule: AttentionRule,
    mask_TL: torch.Tensor,
) -> torch.Tensor:
    """The written-out softmax, for what `scaled_dot_product_attention` has no argument for."""
    tokens, heads, _ = query_THD.shape
    kv_heads, length, _ = keys_GLD.shape
    query_GND = query_THD.transpose(0, 1).reshape(kv_heads, -1, query_THD.shape[-1])  # N = R * T
    scores_HTL = (query_GND.float() @ keys_GLD.float().transpose(1, 2)).view(heads, tokens, length) * rule.scaling
    if rule.softcap is not None:
        scores_HTL = rule.softcap * torch.tanh(scores_HTL / rule.softcap)
    scores_HTL = scores_HTL.masked_fill(~mask_TL, float("-inf"))
    if rule.sinks_H is not None:
        sinks_HT1 = rule.sinks_H.float().view(heads, 1, 1).expand(heads, tokens, 1)
        scores_HTL = torch.cat([scores_HTL, sinks_HT1], dim=-1)
    weights_HTL = scores_HTL.softmax(dim=-1)[..., :length]
    out_GND = weights_HTL.view(kv_heads, -1, length) @ values_GLD.float()
    return out_GND.view(heads, tokens, -1).transpose(0, 1).to(query_THD.dtype)

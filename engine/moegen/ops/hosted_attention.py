"""Attention on a device whose keys and values live on the host.

New keys and values go home in one copy and are written into their pages by the host. Prompts are attended on the
device, where their keys and values still are. Decode tokens are attended where it pays: a share of them by the host's
cores, over the pages in place, queries coming over and answers going back; the others on the device, over pages that
are gathered and sent to it, while the host's cores are at theirs.

The pages themselves are plain memory of the host, not page-locked: the device never reads them where they lie, since
copies of single pages would be far too small for the link, and locking most of the host's memory takes a while.

Shape suffixes as in `moegen.ops.attention`; S decode spans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from moegen.ops.attention import AttentionRule, absorbed_decode, span_attention
from moegen.ops.gathered_decode import gathered_decode
from moegen.ops.kv_pages import LayerPages
from moegen.ops.link import Link
from moegen.ops.paged_kernel import KV_DTYPES, attend_pages
from moegen.schedule.step import AttentionBatch, Ints, QuerySpans, Span


@dataclass(frozen=True)
class HostedAttention:
    """How a device reaches pages on the host. `on_host` is the share of decode attention's KV that the host works off.

    Pages in a dtype that the host's kernel does not read are all attended on the device.
    """

    link: Link
    on_host: float

    def attend(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, pages: LayerPages,
        batch: AttentionBatch, rule: AttentionRule,
    ) -> torch.Tensor:  # fmt: skip
        """Writes the batch's keys and values into `pages` and answers its queries, `[T, H, value_dim]`."""
        on_host = self.on_host if pages.keys_PGCD.dtype in KV_DTYPES else 0.0
        here, there = _split(batch.decode, on_host)
        new = pages.kept(key_TGD, value_TGD)
        rows_S = torch.from_numpy(here.rows).to(query_THD.device)
        query_SHD = query_THD[rows_S] if rule.latent is None else rule.latent.absorb(query_THD[rows_S])
        sinks = [] if rule.sinks_H is None else [rule.sinks_H]
        *own, query_SHD = self.link.to_host(*sinks, *new, query_SHD)
        host_rule = replace(rule, latent=None, sinks_H=own.pop(0) if sinks else None)
        pages.put(own, batch)
        out_THD = query_THD.new_empty(*query_THD.shape[:2], rule.value_dim(value_TGD))
        self._attend_there(query_THD, *pages.pair(new), pages, batch.prefill, there, rule, out_THD)
        if len(here.rows):
            answer_SHD = self.link.to_device(self._attend_here(query_SHD, pages, here, host_rule)).to(out_THD.dtype)
            out_THD[rows_S] = answer_SHD if rule.latent is None else rule.latent.lift(answer_SHD).to(out_THD.dtype)
        return out_THD

    def _attend_there(
        self, query_THD: torch.Tensor, keys_TGD: torch.Tensor, values_TGD: torch.Tensor, pages: LayerPages,
        prefill: tuple[Span, ...], decode: QuerySpans, rule: AttentionRule, out_THD: torch.Tensor,
    ) -> None:  # fmt: skip
        """What the device works off: asked of it, not waited for."""
        for span in prefill:
            own = slice(span.first, span.first + span.length)
            if span.length == span.kv_length:
                first, keys_GLD, values_GLD = 0, keys_TGD[own].transpose(0, 1), values_TGD[own].transpose(0, 1)
            else:
                first = rule.first_key(span.kv_length - span.length, pages.page_tokens)
                keys_GLD, values_GLD = self._brought(pages, span, first)
            out_THD[own] = span_attention(query_THD[own], keys_GLD, values_GLD, first, span, rule)
        if not len(decode.rows):
            return

        def gathered(query_THD: torch.Tensor, spans: QuerySpans, rule: AttentionRule, out_THD: torch.Tensor) -> None:
            ask = partial(self._pages, pages)
            gathered_decode(query_THD, ask, pages.gathered_bytes, pages.page_tokens, spans, rule, out_THD)

        absorbed_decode(gathered, query_THD, pages.keys_PGCD.shape[-1], decode, rule, out_THD)

    def _attend_here(
        self, query_SHD: torch.Tensor, pages: LayerPages, decode: QuerySpans, rule: AttentionRule
    ) -> torch.Tensor:
        """In float32, row after row of `query_SHD`."""
        answer_SHD = torch.empty(*query_SHD.shape[:2], pages.values_PGCD.shape[-1])
        spans = replace(decode, rows=np.arange(len(decode.rows)))
        attend_pages(query_SHD, pages, spans, rule, answer_SHD)
        return answer_SHD

    def _pages(self, pages: LayerPages, ids_N: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        return pages.pair(self.link.rows_to_device(pages.tables, ids_N))

    def _brought(self, pages: LayerPages, span: Span, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence from token `first` (a page's first) on, `[G, L, D]` on the device."""
        ids_N = np.array(span.pages[first // pages.page_tokens : -(-span.kv_length // pages.page_tokens)], np.int64)
        keys, values = (x.transpose(0, 1).flatten(1, 2)[:, : span.kv_length - first] for x in self._pages(pages, ids_N))
        return keys, values


def _split(spans: QuerySpans, share: float) -> tuple[QuerySpans, QuerySpans]:
    """The first spans, which together have about this share of all keys, and the others."""
    ends = np.cumsum(spans.kv_lengths)
    count = int(np.searchsorted(ends - spans.kv_lengths / 2, share * ends[-1], side="right")) if len(ends) else 0
    return spans.part(0, count), spans.part(count, len(ends))

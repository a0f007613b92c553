"""The pages of one layer's keys and values, written and gathered in bulk.

Shape suffixes: P pages, G KV heads, C tokens per page, D head dim. A page of one KV head is one contiguous run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegen.schedule.step import AttentionBatch, Ints, Span


@dataclass(frozen=True, slots=True)
class LayerPages:
    """The pages of one layer."""

    keys_PGCD: torch.Tensor
    values_PGCD: torch.Tensor

    @property
    def page_tokens(self) -> int:
        return self.keys_PGCD.shape[2]

    def write(self, keys_TGD: torch.Tensor, values_TGD: torch.Tensor, batch: AttentionBatch) -> None:
        """Puts each token's key and value into its page, in one scatter per tensor."""
        pages = torch.from_numpy(batch.write_pages).to(self.keys_PGCD.device)
        slots = torch.from_numpy(batch.write_slots).to(self.keys_PGCD.device)
        self.keys_PGCD[pages, :, slots] = keys_TGD.to(self.keys_PGCD)
        self.values_PGCD[pages, :, slots] = values_TGD.to(self.values_PGCD)

    def rows(self, ids_N: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole pages, `[N, G, C, D]` each."""
        ids = torch.from_numpy(ids_N).to(self.keys_PGCD.device)
        return self.keys_PGCD.index_select(0, ids), self.values_PGCD.index_select(0, ids)

    def gather(self, span: Span, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence from token `first` (a page's first) to the span's last, each `[G, L, D]`."""
        pages = torch.tensor(span.pages[first // self.page_tokens : -(-span.kv_length // self.page_tokens)])
        pages = pages.to(self.keys_PGCD.device)
        length = span.kv_length - first
        keys_GLD, values_GLD = (
            x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (self.keys_PGCD, self.values_PGCD)
        )
        return keys_GLD, values_GLD

"""The pages of one layer's keys and values, written and gathered in bulk.

Shape suffixes: P pages, G KV heads, C tokens per page, D head dim, R a latent's rank, W its width with the rotary part.
A page of one KV head is one contiguous run.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def page_bytes(self) -> int:
        """Of one page of this layer."""
        return sum(table[0].nbytes for table in self.tables)

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """What is kept."""
        return self.keys_PGCD, self.values_PGCD

    def kept(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What of keys and values goes into each table."""
        return keys, values

    def pair(self, kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, from what was kept of them."""
        keys, values = kept
        return keys, values

    def write(self, keys_TGD: torch.Tensor, values_TGD: torch.Tensor, batch: AttentionBatch) -> None:
        """Puts each token's key and value into its page, in one scatter per tensor."""
        pages = torch.from_numpy(batch.write_pages).to(self.keys_PGCD.device)
        slots = torch.from_numpy(batch.write_slots).to(self.keys_PGCD.device)
        for table, new in zip(self.tables, self.kept(keys_TGD, values_TGD), strict=True):
            table[pages, :, slots] = new.to(table)

    def rows(self, ids_N: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole pages, `[N, G, C, D]` each."""
        ids = torch.from_numpy(ids_N).to(self.keys_PGCD.device)
        return self.pair([table.index_select(0, ids) for table in self.tables])

    def gather(self, span: Span, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence from token `first` (a page's first) to the span's last, each `[G, L, D]`."""
        pages = torch.tensor(span.pages[first // self.page_tokens : -(-span.kv_length // self.page_tokens)])
        pages = pages.to(self.keys_PGCD.device)
        length = span.kv_length - first
        return self.pair([table[pages].transpose(0, 1).flatten(1, 2)[:, :length] for table in self.tables])


@dataclass(frozen=True, slots=True)
class LatentPages(LayerPages):
    """Of latents: one KV head, whose value is the first R elements of its key (`values_PGCD` is a view)."""

    @classmethod
    def of(cls, kept_P1CW: torch.Tensor, rank: int) -> LatentPages:
        return cls(kept_P1CW, kept_P1CW[..., :rank])

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        return (self.keys_PGCD,)

    def kept(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (keys,)

    def pair(self, kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        (keys,) = kept
        return keys, keys[..., : self.values_PGCD.shape[-1]]

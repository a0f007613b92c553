"""The pages of one layer's keys and values, written and gathered in bulk.

Shape suffixes: T tokens, P pages, N some of them, G KV heads, C tokens per page, L tokens of a sequence, D head dim,
R a latent's rank, W its width with the rotary part. A page of one KV head is one contiguous run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegen.ops.scatter_kernel import scatter_tokens
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
    def gathered_bytes(self) -> int:
        """Of the keys and values of one page, once they are gathered."""
        return self.page_bytes

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """What is kept."""
        return self.keys_PGCD, self.values_PGCD

    def kept(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What of keys and values goes into each table, in its dtype."""
        return keys.to(self.keys_PGCD.dtype), values.to(self.values_PGCD.dtype)

    def pair(self, kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, from what was kept of them."""
        keys, values = kept
        return keys, values

    def write(self, keys_TGD: torch.Tensor, values_TGD: torch.Tensor, batch: AttentionBatch) -> None:
        """Puts each token's key and value into its page."""
        self.put(self.kept(keys_TGD, values_TGD), batch)

    def put(self, kept: Sequence[torch.Tensor], batch: AttentionBatch) -> None:
        """What is kept of each token into its page, in one scatter per table."""
        if self.keys_PGCD.device.type == "cpu":
            for table, new in zip(self.tables, kept, strict=True):
                scatter_tokens(table, batch.write_pages, batch.write_slots, new.to(table.device))
            return
        pages = torch.from_numpy(batch.write_pages).to(self.keys_PGCD.device)
        slots = torch.from_numpy(batch.write_slots).to(self.keys_PGCD.device)
        for table, new in zip(self.tables, kept, strict=True):
            table[pages, :, slots] = new.to(table.device)

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
        return (keys.to(self.keys_PGCD.dtype),)

    def pair(self, kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        (keys,) = kept
        return keys, keys[..., : self.values_PGCD.shape[-1]]


@dataclass(frozen=True, slots=True)
class CodedPages(LayerPages):
    """Keys and values as int8 codes with a float32 scale for each token and KV head: an element is code * scale.

    The largest magnitude of a token's key (or value) in a KV head gets the code 127, so the error of an element is at
    most scale / 2. A token's codes depend on nothing but its own key and value: neither on what shares its page nor on
    how its prompt was cut.
    """

    key_scales_PGC: torch.Tensor
    value_scales_PGC: torch.Tensor

    @property
    def gathered_bytes(self) -> int:
        return 4 * (self.keys_PGCD[0].numel() + self.values_PGCD[0].numel())

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        return self.keys_PGCD, self.values_PGCD, self.key_scales_PGC, self.value_scales_PGC

    def kept(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (key_codes, key_scales), (value_codes, value_scales) = _coded(keys), _coded(values)
        return key_codes, value_codes, key_scales, value_scales

    def pair(self, kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        key_codes, value_codes, key_scales, value_scales = kept
        return key_codes * key_scales[..., None], value_codes * value_scales[..., None]


def _coded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[..., D]` and scales `[...]`. What is not finite makes a scale that is not: it is not hidden."""
    rows = rows.float()
    scales = rows.abs().amax(-1) / 127
    return (rows / torch.where(scales > 0, scales, 1.0)[..., None]).round().to(torch.int8), scales

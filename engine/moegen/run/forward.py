"""One pass: the flat tokens of a step through the model, to the logits of the tokens that end a sequence so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from moegen.memory.kv_pool import KVPool
from moegen.model.host import ModelHost
from moegen.model.seams import Observer
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.schedule.step import AttentionBatch, Step


@dataclass(frozen=True, slots=True)
class Pass:
    """What the layers of one pass share: its micro-batches and the pages (an `AttentionContext`)."""

    batches: tuple[AttentionBatch, ...]
    tokens: int
    pool: KVPool
    observer: Observer
    current: AttentionBatch | None = None  # the micro-batch at hand, inside an attention stage

    def within(self, batch: AttentionBatch) -> Pass:
        return replace(self, current=batch)

    def attend(
        self, layer: nn.Module, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:  # fmt: skip
        """A layer that runs whole brings all its tokens at once; they are worked off batch by batch here."""
        pages = self.pool.layers[layer]
        with self.observer.timed("attention"):
            if self.current is not None:
                pages.write(key_TGD, value_TGD, self.current)
                return paged_attention(query_THD, pages, self.current, rule)
            out = []
            for batch in self.batches:
                own = slice(batch.first, batch.first + batch.length)
                pages.write(key_TGD[own], value_TGD[own], batch)
                out.append(paged_attention(query_THD[own], pages, batch, rule))
            return torch.cat(out)


@torch.inference_mode()
def forward(
    host: ModelHost,
    pool: KVPool,
    step: Step,
    attention_tokens: int,
    *,
    logit_tokens: int | None = None,
    keep: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Logits of `step.last_tokens`, or of the token indices `keep`, in order: `[s, V]`, at most `logit_tokens` a time.

    Every token's KV is in the pool once the first piece is there.
    """
    this = Pass(tuple(step.attention_batches(attention_tokens)), step.tokens, pool, host.observer)
    yield from host.logits(
        torch.from_numpy(step.token_ids),
        torch.from_numpy(step.positions),
        torch.from_numpy(step.last_tokens) if keep is None else keep,
        this,
        logit_tokens,
    )

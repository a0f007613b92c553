"""One pass: the flat tokens of a step through the model, to the logits of the tokens that end a sequence so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moegen.memory.kv_pool import KVPool
from moegen.model.host import ModelHost
from moegen.model.seams import Done, Observer
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.ops.micro_batch import MicroBatch
from moegen.schedule.step import AttentionBatch, Step


@dataclass(frozen=True, slots=True)
class Pass:
    """What the layers of one pass share: its micro-batches and the pages (a `PassContext`)."""

    step: Step
    at_once: MicroBatch
    pool: KVPool
    observer: Observer
    current: AttentionBatch | None = None  # the micro-batch at hand, inside an attention stage
    _cuts: dict[int, tuple[AttentionBatch, ...]] = field(default_factory=dict)  # by the size of a micro-batch

    @property
    def tokens(self) -> int:
        return self.step.tokens

    def in_batches(self, work: Callable[[Sequence[AttentionBatch]], Done]) -> Done:
        return self.at_once.run(lambda most: work(self._cut(most)), self.tokens)

    def _cut(self, most: int) -> tuple[AttentionBatch, ...]:
        """Once for all layers: they ask for the same arrays."""
        if most not in self._cuts:
            self._cuts[most] = tuple(self.step.attention_batches(most))
        return self._cuts[most]

    def within(self, batch: AttentionBatch) -> Pass:
        return replace(self, current=batch)

    def attend(
        self, layer: nn.Module, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:  # fmt: skip
        """A layer that runs whole brings all its tokens at once; they are worked off batch by batch here."""
        pages, group = self.pool.layers[layer], self.pool.group_of[layer]

        def one(batch: AttentionBatch, own: slice) -> torch.Tensor:
            batch = batch.of_group(group)
            if self.pool.hosted is not None:
                return self.pool.hosted.attend(query_THD[own], key_TGD[own], value_TGD[own], pages, batch, rule)
            pages.write(key_TGD[own], value_TGD[own], batch)
            return paged_attention(query_THD[own], pages, batch, rule)

        def every(batches: Sequence[AttentionBatch]) -> torch.Tensor:
            return torch.cat([one(batch, slice(batch.first, batch.first + batch.length)) for batch in batches])

        with self.observer.timed("attention"):
            return self.in_batches(every) if self.current is None else one(self.current, slice(None))


@torch.inference_mode()
def forward(
    host: ModelHost,
    pool: KVPool,
    step: Step,
    attention_tokens: int | MicroBatch,
    *,
    logit_tokens: int | None = None,
    keep: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Logits of `step.last_tokens`, or of the token indices `keep`, in order: `[s, V]`, at most `logit_tokens` a time.

    Attention runs in micro-batches of `attention_tokens`. Every token's KV is in the pool once the first piece is
    there.
    """
    this = Pass(step, MicroBatch.of(attention_tokens, "attention"), pool, host.observer)
    yield from host.logits(
        torch.from_numpy(step.token_ids),
        torch.from_numpy(step.positions),
        torch.from_numpy(step.last_tokens) if keep is None else keep,
        this,
        logit_tokens,
    )

"""One pass: the flat tokens of a step through the model, to the logits of the tokens that end a sequence so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moegen.errors import BudgetError
from moegen.memory.kv_pool import KVPool
from moegen.memory.state_pool import StatePool
from moegen.model.host import ModelHost
from moegen.model.recurrent import RecurrentModule, recur
from moegen.model.seams import Done, Observer
from moegen.model.sparse import PagedIndexer, as_wide, cut
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.ops.micro_batch import MicroBatch
from moegen.schedule.step import AttentionBatch, Step


@dataclass(frozen=True, slots=True)
class Pass:
    """What the layers of one pass share: its micro-batches, the pages and the state slots (a `PassContext`)."""

    step: Step
    at_once: MicroBatch
    pool: KVPool
    states: StatePool | None
    observer: Observer
    rounded: bool  # see `paged_attention`
    kept: torch.Tensor | None  # see `PassContext`
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
        pages, group, whole = self.pool.layers[layer], self.pool.group_of[layer], rule

        def one(batch: AttentionBatch, own: slice) -> torch.Tensor:
            batch = batch.of_group(group)
            rule = whole if whole.chosen_TK is None else replace(whole, chosen_TK=whole.chosen_TK[own])
            if self.pool.hosted is not None and rule.chosen_TK is not None:
                raise BudgetError("engine.plan.kv_home: layers with a sparse indexer run with 'device' only")
            if self.pool.hosted is not None:
                return self.pool.hosted.attend(query_THD[own], key_TGD[own], value_TGD[own], pages, batch, rule)
            kept = pages.kept(key_TGD[own], value_TGD[own])
            pages.put(kept, batch)
            return paged_attention(query_THD[own], pages, batch, rule, new=kept, rounded=self.rounded)

        def every(batches: Sequence[AttentionBatch]) -> torch.Tensor:
            return torch.cat([one(batch, batch.own) for batch in batches])

        with self.observer.timed("attention"):
            return self.in_batches(every) if self.current is None else one(self.current, slice(None))

    def choose(self, layer: PagedIndexer, given: Mapping[str, Any]) -> torch.Tensor:
        """As `attend`: all tokens of a layer that runs whole come at once."""
        pages = self.pool.layers[layer]

        def of(batch: AttentionBatch) -> torch.Tensor:
            return layer.choose(
                {name: cut(value, batch.own, self.tokens) for name, value in given.items()}, pages, batch
            )

        def every(batches: Sequence[AttentionBatch]) -> torch.Tensor:
            found = [of(batch) for batch in batches]
            most = max(chosen.shape[-1] for chosen in found)
            return torch.cat([as_wide(chosen, most) for chosen in found], dim=1)

        with self.observer.timed("attention"):
            return self.in_batches(every) if self.current is None else layer.choose(given, pages, self.current)

    def recur(self, layer: RecurrentModule, hidden_1TD: torch.Tensor) -> Any:
        """As `attend`: all tokens of a layer that runs whole come at once."""
        states = self.states
        assert states is not None, "a model with recurrent layers runs with slots"

        def every(batches: Sequence[AttentionBatch]) -> Any:
            cut = (hidden_1TD[:, batch.own] for batch in batches)
            return _joined([recur(layer, x, batch, states, self.step) for x, batch in zip(cut, batches, strict=True)])

        with self.observer.timed("attention"):
            return (
                self.in_batches(every)
                if self.current is None
                else recur(layer, hidden_1TD, self.current, states, self.step)
            )


def _joined(answers: list[Any]) -> Any:
    """Answers of consecutive micro-batches as one, `[1, T, ...]`, each a tensor or a tuple of such and None."""
    if isinstance(answers[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*answers, strict=True))
    return None if answers[0] is None else torch.cat(answers, dim=1)


@torch.inference_mode()
def forward(
    host: ModelHost,
    pool: KVPool,
    step: Step,
    attention_tokens: int | MicroBatch,
    *,
    states: StatePool | None = None,
    logit_tokens: int | None = None,
    keep: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Logits of `step.last_tokens`, or of the token indices `keep`, in order: `[s, V]`, at most `logit_tokens` a time.

    Attention runs in micro-batches of `attention_tokens`. Every token's KV is in the pool, and every sequence's state
    in `states`, once the first piece is there.
    """
    keep = torch.from_numpy(step.last_tokens) if keep is None else keep
    at_once = MicroBatch.of(attention_tokens, "attention")
    this = Pass(step, at_once, pool, states, host.observer, host.rounded, _kept(keep, step.tokens, host.device))
    token_ids, positions = torch.from_numpy(step.token_ids), torch.from_numpy(step.positions)
    yield from host.logits(token_ids, positions, keep, this, logit_tokens)


def _kept(keep: torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor | None:
    """As `PassContext.kept`: no module of a family is asked to make nothing of no tokens."""
    if len(keep) == tokens:
        return None
    return (keep if len(keep) else torch.tensor([tokens - 1])).to(device)

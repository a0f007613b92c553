"""State slots: where each running sequence keeps what recurrent layers carry, and how a micro-batch's tokens meet it.

Ids only; the bytes live in `moegen.memory.state_pool`. A sequence has one slot, the same in every layer, from its
admission to its end or its preemption. Nothing is carried over in a slot: whatever begins at a sequence's first token
begins without a state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moegen.schedule.step import AttentionBatch, Ints, Span


class SlotLedger:
    """Slot ids 0 .. slots - 1, each free or lent. The most recently returned slot is lent first (it is warm)."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free slot; there must be one."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)


@dataclass(frozen=True, slots=True)
class StateCall:
    """Tokens that a recurrent layer computes in one call: as many of each of S sequences, each after its own state."""

    rows: Ints  # [S, n] indices in the micro-batch
    slots: Ints  # [S]
    fresh: bool  # the sequences begin here: there is no state before

    def split(self, most: int) -> Iterator[StateCall]:
        """At most `most` sequences at a time."""
        for first in range(0, len(self.slots), most):
            part = slice(first, first + most)
            yield StateCall(self.rows[part], self.slots[part], self.fresh)


def state_calls(batch: AttentionBatch, *, one_by_one: bool) -> Iterator[StateCall]:
    """The calls that a recurrent layer takes over `batch`, in an order in which every state is there before its use.

    Spans of one length are computed together: so all decode tokens are one call. With `one_by_one`, for layers that
    take a state for single tokens only, what is left of prompts is computed token by token, all sequences at a time.
    """
    alike: dict[tuple[int, bool], list[Span]] = {}
    stepped: list[Span] = []
    for span in batch.spans:
        fresh = span.kv_length == span.length
        if one_by_one and not fresh and span.length > 1:
            stepped.append(span)
        else:
            alike.setdefault((span.length, fresh), []).append(span)
    for (length, fresh), spans in alike.items():
        yield _call(spans, range(length), fresh)
    for token in range(max((span.length for span in stepped), default=0)):
        yield _call([span for span in stepped if span.length > token], range(token, token + 1), False)


def _call(spans: list[Span], tokens: range, fresh: bool) -> StateCall:
    firsts = np.array([span.first for span in spans], np.int64)
    return StateCall(firsts[:, None] + np.array(tokens), np.array([span.slot for span in spans], np.int64), fresh)

"""The masks of a pass's answers, computed in a thread of their own while the device computes the pass.

A mask depends only on tokens that are known when the pass begins, and the library that fills it lets go of Python.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np

from moegen.answer.grammar import Bits, Matcher
from moegen.schedule.sequence import Sequence


class Masks(AbstractContextManager["Masks"]):
    """Which tokens may come next in each answer that is bound to a grammar. Use as a context manager.

    Matchers live as long as their sequences; a preempted sequence keeps its own, for its tokens stay.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None  # no thread for a job of free answers
        self._matchers: dict[Sequence, Matcher] = {}
        self._pending: Future[Bits] | None = None

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def begin(self, sequences: Rows[Sequence]) -> None:
        """Starts on the masks of the sequences whose next token the pass will sample."""
        self._pending = None
        if any(sequence.request.grammar is not None for sequence in sequences):
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="masks")
            self._pending = self._pool.submit(self._masks, list(sequences))

    def take(self) -> Bits | None:
        """The masks that were begun, in that order, once they are there; None where every answer is free."""
        return self._pending.result() if self._pending is not None else None

    def failed(self, sequence: Sequence) -> bool:
        """Whether the library gave the answer up: its mask was no mask, and its next token means nothing."""
        matcher = self._matchers.get(sequence)
        return matcher is not None and matcher.failed

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done."""
        self._matchers.pop(sequence, None)

    def _masks(self, sequences: list[Sequence]) -> Bits:
        bound = [row for row, sequence in enumerate(sequences) if sequence.request.grammar is not None]
        matchers = [self._matcher(sequences[row]) for row in bound]
        grammar = sequences[bound[0]].request.grammar  # a job has one, and its matchers say where in it they are
        assert grammar is not None
        filled = grammar.masks(matchers)
        masks = np.full((len(sequences), filled.shape[1]), 0xFF, np.uint8)
        masks[bound] = filled
        for row, matcher in zip(bound, matchers, strict=True):
            if (ends := sequences[row].request.params.stop_token_ids) and matcher.complete:
                _allow(masks[row], ends)
        return masks

    def _matcher(self, sequence: Sequence) -> Matcher:
        matcher = self._matchers.get(sequence)
        if matcher is None:
            assert sequence.request.grammar is not None
            matcher = self._matchers[sequence] = sequence.request.grammar.matcher()
        matcher.follow(sequence.answer)
        return matcher


def _allow(mask: Bits, token_ids: Rows[int]) -> None:
    """A row's own stop tokens may come where the model's end tokens may."""
    for token_id in token_ids:
        if token_id < 8 * len(mask):
            mask[token_id // 8] |= np.uint8(1 << token_id % 8)

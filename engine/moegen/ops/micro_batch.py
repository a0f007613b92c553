"""How many tokens the device works on at once: fewer from then on, whenever it has no room for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from moegen.errors import BudgetError

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class MicroBatch:
    """The size of one stage's micro-batches. An allocation that the device refuses halves it for good.

    One per stage and engine: what a pass has learnt the next ones know.

    Attributes:
        tokens: that a micro-batch may have, now.
    """

    def __init__(self, tokens: int, stage: str) -> None:
        self.tokens = tokens
        self._stage = stage

    @classmethod
    def of(cls, tokens: int | MicroBatch, stage: str) -> MicroBatch:
        """`tokens` itself, or a fresh one of so many."""
        return tokens if isinstance(tokens, MicroBatch) else cls(tokens, stage)

    def run(self, work: Callable[[int], _T], tokens: int) -> _T:
        """`work(most)`, in micro-batches of `most` tokens, of which `tokens` are there; again with half as many when
        the device has no room. So `work` must be such that it can begin anew.

        Raises:
            BudgetError: there is no room for a single token.
        """
        while True:
            most = max(min(self.tokens, tokens), 1)
            try:
                return work(most)
            except torch.OutOfMemoryError as error:
                refusal = str(error).partition("\n")[0]
            # Only here, outside the except block, are the tensors of the attempt free: its traceback held them.
            self._halve(most, refusal)

    def _halve(self, tried: int, refusal: str) -> None:
        if tried == 1:
            raise BudgetError(
                f"engine.device_memory: there is no room for the {self._stage} of a single token ({refusal}); leave "
                "the device more memory beside the plan: lower engine.device_memory, or free what else is on it"
            )
        self.tokens = tried // 2
        log.warning(
            "the device has no room for %d tokens in the %s stage (%s): from now on %d at once",
            tried, self._stage, refusal, self.tokens,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks kept for tensors of the old size

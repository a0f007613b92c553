"""How much work a job is: its rows and the lengths of their prompts and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moegen.plan.cost import Load
from moegen.plan.curve import Floats
from moegen.plan.plan import Plan
from moegen.schedule.step import Ints


@dataclass(frozen=True)
class Workload:
    """`rows` rows whose lengths are drawn from `lengths`, each a (prompt tokens, answer tokens) pair, equally likely.

    With as many lengths as rows, each row has its own. Of a plan that shares a prefix, every prompt is taken to begin
    with it.
    """

    rows: int
    lengths: tuple[tuple[int, int], ...]
    prefix_tokens: int = 0  # that nearly all prompts begin with

    @classmethod
    def of(cls, rows: int, prompt_tokens: Sequence[int], answer_tokens: Sequence[int]) -> Workload:
        """Every prompt length with every answer length."""
        return cls(rows, tuple((p, a) for p in prompt_tokens for a in answer_tokens))

    @cached_property
    def mean_prompt(self) -> float:
        return float(np.mean([prompt for prompt, _ in self.lengths]))

    @cached_property
    def mean_answer(self) -> float:
        return float(np.mean([answer for _, answer in self.lengths]))

    @cached_property
    def longest(self) -> int:
        return max(prompt + answer for prompt, answer in self.lengths)

    @cached_property
    def mean_context(self) -> float:
        """KV tokens of a running sequence, averaged over its life: long answers stay longer."""
        prompts, answers = self._lengths
        return float(np.sum(answers * (prompts + answers / 2)) / np.sum(answers))

    @cached_property
    def _lengths(self) -> Ints:
        """Of prompts, and of answers."""
        return np.array(self.lengths, np.int64).T

    def concurrency(self, plan: Plan) -> float:
        """Sequences in a pass of the steady state: as many as the pages, the pass's tokens and the rows allow."""
        tokens = plan.pass_tokens * self.mean_answer / (self.mean_answer + self._mean_computed(plan) - 1)
        return min(self._paged(plan), max(tokens, 1.0), self.rows)

    def _paged(self, plan: Plan) -> float:
        """Sequences that there are pages and state slots for."""
        room = plan.kv_pages * plan.page_tokens - plan.prefix_tokens * len(plan.kv_windows)
        paged = max(room / self._paged_tokens(plan), 1.0)
        return min(paged, plan.state_slots or paged)

    def _paged_tokens(self, plan: Plan) -> float:
        """Of the mean sequence, in whole pages, of all groups of layers."""
        own = max(self.mean_context - plan.prefix_tokens, 1.0)
        slack = max(self._held_pages(plan.page_tokens, plan.prefix_tokens) * plan.page_tokens - own, 0.0)
        return sum(min(own, window or own) + slack for window in plan.kv_windows)

    def _held_pages(self, size: int, prefix_tokens: int) -> float:
        """Of one group that keeps all tokens, with the page that is kept free for as long as a sequence may grow."""
        prompts, answers = self._lengths
        first = np.maximum(prompts - prefix_tokens, 1)
        end = first + answers
        most = -(-(end - 1) // size)
        grown = np.clip((most - 1) * size, first, end)  # from here on it has all its pages
        held = _pages_summed(grown, size) - _pages_summed(first, size) + (grown - first) + most * (end - grown)
        return float(held.sum() / answers.sum())

    def steady_pages(self, plan: Plan) -> int:
        """That are in use at once in the steady state."""
        tokens = self.concurrency(plan) * self._paged_tokens(plan) + plan.prefix_tokens * len(plan.kv_windows)
        return min(math.ceil(tokens / plan.page_tokens), plan.kv_pages)

    def steady_pass(self, plan: Plan) -> Load:
        """The mean pass of the steady state, every field `[1]`."""
        sequences = self.concurrency(plan)
        starting = sequences / self.mean_answer  # of those sequences, in each pass
        return self._load(plan, [starting], [sequences - starting])

    def phases(self, plan: Plan) -> tuple[Load, Floats]:
        """The job as passes that admit rows and passes after the last admission: the mean of each, and their number.

        Rows enter evenly, as fast as tokens per pass and pages allow beside those that are decoding, and each goes on
        for as many passes as its answer has tokens.
        """
        decoded, paged = self.mean_answer - 1, self._paged(plan)  # the prefill gives the first token

        def left(admitting: float) -> float:
            """Tokens that are still to be generated when the last row has entered."""
            in_flight = min(self.rows * min(self.mean_answer / admitting, 1.0), paged)
            return in_flight * (decoded - (min(admitting, self.mean_answer) - 1) / 2)

        def needed(admitting: float) -> float:
            """Passes for what is done in so many."""
            generated = max(self.rows * decoded - left(admitting), 0.0)
            return max((self.rows * self._mean_computed(plan) + generated) / plan.pass_tokens, generated / paged, 1.0)

        low, high = 1.0, self.rows * (self._mean_computed(plan) + self.mean_answer)
        while high - low > 1e-3 * low:
            middle = (low + high) / 2
            low, high = (middle, high) if needed(middle) > middle else (low, middle)
        after = left(high)
        before = max(self.rows * decoded - after, 0.0)
        load = self._load(plan, [self.rows / high, 0.0], [before / high, after / max(decoded, 1e-9)])
        return load, np.array([high, decoded])

    def _load(self, plan: Plan, starting: Sequence[float], decoding: Sequence[float]) -> Load:
        """Passes in which so many sequences are prefilled, and so many have a decode token."""
        prefills, decodes = np.array(starting), np.array(decoding)
        prefilled = prefills * self._mean_computed(plan)
        return Load(
            tokens=decodes + prefilled,
            sequences=decodes + prefills,
            sampled=decodes + prefills,
            decode_sequences=decodes,
            decode_kv_tokens=decodes * self.mean_context,
            prefill_chunks=prefills,
            prefill_tokens=prefilled,
            prefill_pairs=prefills * max(self._mean_pairs - _pairs(plan.prefix_tokens), 1.0),
            kept=decodes + prefills,
        )

    def _mean_computed(self, plan: Plan) -> float:
        """Tokens of a prompt that are its own to compute."""
        return max(self.mean_prompt - plan.prefix_tokens, 1.0)

    @cached_property
    def _mean_pairs(self) -> float:
        return float(np.mean([_pairs(prompt) for prompt, _ in self.lengths]))


def _pages_summed(tokens: Ints, page_tokens: int) -> Ints:
    """Pages of a sequence, summed over its life from no token to so many."""
    whole, rest = np.divmod(tokens, page_tokens)
    return page_tokens * whole * (whole + 1) // 2 + rest * (whole + 1)


def _pairs(prompt_tokens: int) -> float:
    """Of a query and a key at or before it."""
    return prompt_tokens * (prompt_tokens + 1) / 2


UNKNOWN = Workload.of(100_000, (128, 512, 1024), (64, 256))
"""What plans are chosen for when nothing is known of the table."""

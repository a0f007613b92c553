"""How likely a row's continuations are: which tokens that takes, and what has come of it so far.

The prompt is computed once. The logits of its last token say how likely each continuation's first token is; a
continuation of more tokens then takes a pass in which it follows the prompt, over the pages of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Tokens = tuple[int, ...]


class Scoring:
    """The continuations of one prompt, each of at least one token.

    Attributes:
        log_likelihoods: of each continuation after the prompt, in nats: sums over its tokens known so far.
    """

    __slots__ = ("_continuations", "_current", "_prompt", "_unknown", "log_likelihoods")

    def __init__(self, prompt: Tokens, continuations: Sequence[Tokens]) -> None:
        self.log_likelihoods = [0.0] * len(continuations)
        self._prompt, self._continuations = prompt, continuations
        self._current: int | None = None  # the continuation that follows the prompt; None: no one yet
        self._unknown = len(prompt) - 1  # the first position whose logits are still asked for

    def positions(self, start: int, stop: int) -> range:
        """Of the sequence's positions in `start .. stop`, those whose logits are asked for.

        What was known before a preemption is not asked for again.
        """
        return range(max(start, self._unknown), stop)

    def targets(self, position: int) -> Iterator[tuple[int, int]]:
        """(continuation, token id) pairs: which tokens' log-probabilities at this position count for which."""
        place = position + 1 - len(self._prompt)  # of the token that is predicted, in its continuation
        if self._current is not None:
            yield self._current, self._continuations[self._current][place]
            return
        for index, continuation in enumerate(self._continuations):
            yield index, continuation[0]

    def add(self, position: int, continuation: int, log_prob: float) -> None:
        """One more token of a continuation is known, from the logits at `position`."""
        self.log_likelihoods[continuation] += log_prob
        self._unknown = position + 1

    def next_tokens(self) -> list[int] | None:
        """What the sequence's tokens must be next, once those that it has are computed; None when all is known."""
        first = 0 if self._current is None else self._current + 1
        longer = (i for i in range(first, len(self._continuations)) if len(self._continuations[i]) > 1)
        self._current = next(longer, None)
        if self._current is None:
            return None
        self._unknown = len(self._prompt)
        return [*self._prompt, *self._continuations[self._current][:-1]]  # its last token predicts nothing

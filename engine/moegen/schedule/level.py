"""How large a pass should be: full while more rows come, level from then on.

When all rows are known, the job takes at least as many passes as the longest answer has tokens left. Were every row
started at once, passes would become small and inefficient as rows end. So the passes to that deadline are filled alike,
and a row that nothing hurries waits. Two things are never put off: a row whose answer may need every pass to the
deadline, and anything while a pass has fewer than `level_tokens`, from which on a larger pass is hardly more efficient.
So answers that end early cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from moegen.schedule.sequence import Sequence


class Level:
    """Decides, pass by pass, up to which size a sequence's tokens may fill the pass."""

    def __init__(self, pass_tokens: int, level_tokens: int) -> None:
        self._pass_tokens, self._level_tokens = pass_tokens, min(level_tokens, pass_tokens)
        self._tokens = pass_tokens  # of a level pass
        self._passes_left: int | None = None  # to the deadline; None while more rows may come

    def begin_pass(self, left: Collection[Sequence], more: bool) -> None:
        """`left` are all sequences that have not ended; `more` says that rows may come that are not among them."""
        if more or not left or self._level_tokens == self._pass_tokens:
            return
        longest = max(sequence.answer_left for sequence in left)
        if self._passes_left is None:
            self._passes_left = longest
        else:  # answers may end early; rows that started late may need a few passes beyond the deadline
            self._passes_left = max(min(self._passes_left - 1, longest), 1)
        alike = -(-sum(sequence.tokens_left for sequence in left) // self._passes_left)
        self._tokens = min(max(alike, self._level_tokens), self._pass_tokens)

    def room(self, sequence: Sequence, taken: int) -> int:
        """Tokens of `sequence` that the pass has room for, with `taken` tokens in it."""
        hurried = self._passes_left is None or sequence.answer_left >= self._passes_left
        return max((self._pass_tokens if hurried else self._tokens) - taken, 0)

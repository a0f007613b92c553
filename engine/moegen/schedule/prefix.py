"""The tokens that rows have in common at their beginning: computed once, in pages that all of them read.

Invariants:
- Whole pages only, and every row goes on beyond them: nobody writes to a shared page but the one that computes it.
- One sequence at a time computes what is missing, the leader. Others enter behind its tokens, in the same pass if that
  pass has the last of them: a layer's keys and values are written before a later token's query reads them.
- The pages are kept while anybody reads them, and after that until somebody else is short of pages. So rows that share
  nothing run as if there were no shared pages, and the pool is as large for a single row as without them.
- They are kept whole, also in groups of layers with a window. A row that fits the pool only without them does without.
"""

from __future__ import annotations

from moegen.schedule.pages import Held, PageLedger
from moegen.schedule.sequence import Request, Sequence
from moegen.schedule.step import Chunk


class SharedPrefix:
    """The shared tokens, cut to whole pages of `ledger`; none at all is the usual case.

    Attributes:
        tokens: how many they are.
        pages: that hold them, or will; empty while nobody has needed them.
    """

    def __init__(self, token_ids: tuple[int, ...], ledger: PageLedger) -> None:
        self.tokens = len(token_ids) // ledger.page_tokens * ledger.page_tokens
        self.pages: Held = []
        self._token_ids = token_ids[: self.tokens]
        self._ledger = ledger
        self._covered = 0  # tokens that are computed, or will be by what is in the pass already
        self._leader: Sequence | None = None
        self._readers = 0

    def shared_by(self, request: Request) -> int:
        """How many tokens the request's sequence need not compute by itself: all or none."""
        if not self.tokens or len(request.token_ids) <= self.tokens:
            return 0
        own = len(request.token_ids) + request.params.max_tokens - self.tokens
        most = self._whole_pages + self._ledger.most_pages(own, whole=bool(request.continuations))
        if most > self._ledger.pages:
            return 0
        return self.tokens if request.token_ids[: self.tokens] == self._token_ids else 0

    def open_to(self, sequence: Sequence) -> bool:
        """Whether it can enter the pass now, behind what is in it."""
        return not sequence.shared or self._leader is None or self._covered == self.tokens

    def missing_pages(self, sequence: Sequence) -> int:
        """Pages that must be free for a sequence that holds none to enter."""
        tokens, whole = len(sequence.tokens), sequence.goes_back
        if not sequence.shared:
            return self._ledger.missing([], tokens, 0, whole=whole)
        absent = self._ledger.missing(self.pages, self.tokens, 0, whole=True)
        there = [[0] * self._ledger.pages_for(self.tokens) for _ in self._ledger.windows]
        return absent + self._ledger.missing(there, tokens, self._covered, whole=whole)

    @property
    def _whole_pages(self) -> int:
        return self._ledger.most_pages(self.tokens, whole=True)

    def enter(self, sequence: Sequence) -> None:
        """The sequence begins with the shared pages, and with what is computed in them; its own pages follow."""
        if not sequence.shared:
            return
        self._ledger.grow(self.pages, self.tokens, whole=True)
        self._readers += 1
        if self._covered < self.tokens:
            self._leader = sequence
        sequence.pages[:] = map(list, self.pages)
        sequence.computed = self._covered

    def add(self, chunk: Chunk) -> None:
        """The chunk is in the pass."""
        if chunk.sequence is self._leader:
            self._covered = min(chunk.start + chunk.length, self.tokens)

    def leave(self, sequence: Sequence) -> None:
        """The sequence's own pages are free, and it reads the shared ones no more."""
        first = sequence.shared // self._ledger.page_tokens
        own = [pages[first:] for pages in sequence.pages]
        sequence.pages.clear()
        self._ledger.give_back(own)
        self._readers -= sequence.shared > 0
        if sequence is self._leader:
            self._leader = None

    def drop(self) -> bool:
        """Frees the shared pages unless somebody reads them; whether there were any."""
        if self._readers or not self.pages:
            return False
        self._ledger.give_back(self.pages)
        self._covered = 0
        return True

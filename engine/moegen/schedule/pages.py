"""The page ledger: which KV pages are free. Ids only; the bytes live in `moegen.memory.kv_pool`."""

from __future__ import annotations


class PageLedger:
    """Page ids 0 .. pages - 1, each free or lent. The most recently returned page is lent first (it is warm)."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        return self.pages * self.page_tokens

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extends `held` until it covers `tokens`; False, and nothing taken, when too few pages are free."""
        missing = self.pages_for(tokens) - len(held)
        if missing > len(self._free):
            return False
        held.extend(self._free.pop() for _ in range(missing))
        return True

    def give_back(self, held: list[int]) -> None:
        self._free.extend(reversed(held))
        held.clear()

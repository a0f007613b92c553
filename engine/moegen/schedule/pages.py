"""The page ledger: which KV pages are free. Ids only; the bytes live in `moegen.memory.kv_pool`.

Layers that see the same window are cut into groups of about equal size. A page has the keys and values of some tokens
in the layers of one group, so every page has the same size and serves any group: there is one stock of free pages. A
sequence has a list of pages for each group, `held[group][token // page_tokens]`. In groups with a window it gives pages
back once no token to come can see them, and takes pages only as far as the next pass may write.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Held = list[list[int]]
Windows = tuple[int | None, ...]

GIVEN_BACK = -1  # in the place of a page that nobody asks for again
_MOST_GROUPS = 8  # every pass makes arrays for each
_MOST_PAGES = 1 << 26  # of one group: a sequence that only sees windows may be as long as it likes


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers (by their place among those that keep keys and values) that share a sequence's page list."""

    window: int | None
    layers: tuple[int, ...]


def layer_groups(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """The groups of layers with these windows, full attention first.

    As many layers in each as the rarest window has, so that this one wastes no part of a page; but few groups.
    """
    if not windows:
        return (LayerGroup(None, ()),)
    kinds = {window: [i for i, own in enumerate(windows) if own == window] for window in windows}
    size = max(min(map(len, kinds.values())), -(-len(windows) // _MOST_GROUPS))
    return tuple(
        LayerGroup(window, tuple(kinds[window][first : first + size]))
        for window in sorted(kinds, key=lambda window: (window is not None, window))
        for first in range(0, len(kinds[window]), size)
    )


class PageLedger:
    """Page ids 0 .. pages - 1, each free or lent. The most recently returned page is lent first (it is warm).

    Attributes:
        gives_back: whether there is a group with a window, so that there can be something to `trim`.
    """

    def __init__(self, pages: int, page_tokens: int, windows: Windows = (None,), pass_tokens: int = 0) -> None:
        """`windows`: of each group; `pass_tokens`: that one pass may add to a sequence, where a group has a window."""
        self.pages = pages
        self.page_tokens = page_tokens
        self.windows = windows
        self.gives_back = any(window is not None for window in windows)
        self._pass_tokens = pass_tokens
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that can run alone."""
        counts = range(min(self.pages, _MOST_PAGES) + 1 if None in self.windows else _MOST_PAGES)
        return (bisect_right(counts, self.pages, key=self._most) - 1) * self.page_tokens

    @property
    def whole_tokens(self) -> int:
        """The same of one that gives nothing back."""
        return self.pages // len(self.windows) * self.page_tokens

    @property
    def growth(self) -> int:
        """Pages that a sequence grows by when a page of tokens is full: others are given back for them."""
        return max(self.windows.count(None), 1)

    def pages_for(self, tokens: int) -> int:
        """Of one group, for so many tokens."""
        return -(-tokens // self.page_tokens)

    def most_pages(self, tokens: int, *, whole: bool = False) -> int:
        """That a sequence of so many tokens has at a time, over all groups; `whole`: nothing is given back."""
        pages = self.pages_for(tokens)
        return pages * len(self.windows) if whole else self._most(pages)

    def _most(self, pages: int) -> int:
        """Over all groups, where one without a window has so many."""
        seen = (self.pages_for(window - 1 + self._pass_tokens) + 1 for window in self.windows if window is not None)
        return self.windows.count(None) * pages + sum(min(pages, most) for most in seen)

    def missing(self, held: Held, tokens: int, computed: int, *, whole: bool = False) -> int:
        """Pages that `grow` would take."""
        return sum(
            max(end - len(own), 0)
            for own, end in zip(held or [[] for _ in self.windows], self._ends(tokens, computed, whole), strict=True)
        )

    def grow(self, held: Held, tokens: int, computed: int = 0, *, whole: bool = False) -> bool:
        """Extends `held` until the next pass can bring it from `computed` to at most `tokens` tokens.

        `whole`: in every group as far as that, whatever a pass adds. False, and nothing taken, when too few pages are
        free.
        """
        if held and min(map(len, held)) * self.page_tokens >= tokens:  # nearly always, of a sequence that decodes
            return True
        if self.missing(held, tokens, computed, whole=whole) > len(self._free):
            return False
        if not held:
            held.extend([] for _ in self.windows)
        for own, end in zip(held, self._ends(tokens, computed, whole), strict=True):
            own.extend(self._free.pop() for _ in range(end - len(own)))
        return True

    def _ends(self, tokens: int, computed: int, whole: bool) -> Iterable[int]:
        """How many pages each group's list must have."""
        near = tokens if whole else min(tokens, computed + self._pass_tokens)
        return (self.pages_for(tokens if window is None else near) for window in self.windows)

    def trim(self, held: Held, computed: int, shared: int = 0) -> None:
        """Gives back what no token from `computed` on sees, but for the pages of the first `shared` tokens."""
        for own, window in zip(held, self.windows, strict=False):
            if window is not None:
                place = max(computed - window + 1, 0) // self.page_tokens - 1
                while place >= shared // self.page_tokens and own[place] != GIVEN_BACK:
                    self._free.append(own[place])
                    own[place] = GIVEN_BACK
                    place -= 1

    def give_back(self, held: Held) -> None:
        """All of them."""
        self._free.extend(page for own in held for page in reversed(own) if page != GIVEN_BACK)
        held.clear()

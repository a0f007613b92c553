"""Which rows of a file belong to the table: one bit per row."""

from __future__ import annotations

import numpy as np

_BLOCK = 1024  # rows; a multiple of 8


class Selection:
    """The rows where `mask` (a bool per row of the file) is true.

    Attributes:
        rows: how many they are.
    """

    def __init__(self, mask: np.ndarray) -> None:
        blocks = np.zeros(-(-len(mask) // _BLOCK) * _BLOCK, bool)
        blocks[: len(mask)] = mask
        counts = blocks.reshape(-1, _BLOCK).sum(1, dtype=np.int64)
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])  # of each block
        self._bits = np.packbits(blocks)
        self.rows = int(self._before[-1])

    def mask(self, first_row: int, rows: int) -> np.ndarray:
        """A bool for each of some consecutive rows of the file."""
        start = first_row // 8
        bits = np.unpackbits(self._bits[start : -(-(first_row + rows) // 8)])
        return bits[first_row - start * 8 :][:rows].astype(bool)

    def before(self, row: int) -> int:
        """How many selected rows come before a row of the file."""
        block = row // _BLOCK
        return int(self._before[block]) + int(self.mask(block * _BLOCK, row - block * _BLOCK).sum())

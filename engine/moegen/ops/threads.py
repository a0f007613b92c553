"""How many threads compute: torch's, and Numba's beside them, as many of the same pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch


def use_threads(count: int) -> None:
    """Of torch, for what the calling thread asks of it from now on.

    torch has a number for each thread, but takes the last one that any thread set when it is first asked for it.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()


@contextmanager
def numba_threads() -> Iterator[int]:
    """For a compiled parallel call: gives Numba torch's number of threads, and that number.

    Numba and torch share one OpenMP, and starting Numba's threads resets the number that torch uses.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield numba.get_num_threads()
    finally:
        torch.set_num_threads(threads)

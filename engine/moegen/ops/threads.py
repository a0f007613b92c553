"""How many threads compute: torch's, and Numba's beside them, as many of the same pool."""

from __future__ import annotations

import threading

import numba
import torch


def use_threads(count: int) -> None:
    """Of torch, for what the calling thread asks of it from now on.

    torch has a number for each thread, but takes the last one that any thread set when it is first asked for it.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()


_wanted = threading.local()  # of this thread, by the last call below: asking Numba costs as much as a small product


def numba_threads() -> int:
    """For a compiled parallel call: gives Numba torch's number of threads, as far as it has them, and that number."""
    threads, most = torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    if getattr(_wanted, "count", None) != threads:
        numba.set_num_threads(min(threads, most))
        torch.set_num_threads(threads)  # both share one OpenMP: starting Numba's threads resets the number of torch's
        _wanted.count = threads
    return int(min(threads, most))


_FEW_ELEMENTS = 1 << 14  # that one thread has done before a second one has woken


def threads_for(elements: int) -> int:
    """As `numba_threads`; 1 for so few elements that are read and written once."""
    threads = numba_threads()
    return threads if elements > _FEW_ELEMENTS else 1

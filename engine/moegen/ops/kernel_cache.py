"""Numba's cache of compiled kernels, for processes that begin at the same moment.

Numba writes a kernel's index and then its code, and reads one after the other, with no lock. Two processes that compile
different variants of a kernel at once can leave an index that names the other's code, and a process that reads while
another writes can take the code of an older source. Either ends in a crash, or in wrong numbers.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core.caching import IndexDataCacheFile


def lock_kernel_cache() -> None:
    """From now on this process reads and writes a kernel's cache only while no other one writes it."""
    if IndexDataCacheFile.save is _save:
        return
    IndexDataCacheFile.save, IndexDataCacheFile.load = _save, _load


_unlocked_save, _unlocked_load = IndexDataCacheFile.save, IndexDataCacheFile.load


def _save(self: Any, key: Any, data: Any) -> None:
    with _locked(self, fcntl.LOCK_EX):
        _unlocked_save(self, key, data)


def _load(self: Any, key: Any) -> Any:
    with _locked(self, fcntl.LOCK_SH):
        return _unlocked_load(self, key)


@contextmanager
def _locked(cache: Any, how: int) -> Iterator[None]:
    try:
        lock = open(f"{cache._index_path}.lock", "ab")  # noqa: SIM115, PTH123
    except OSError:  # a cache that cannot be written is only read, and nobody else writes it
        yield
        return
    with lock:
        fcntl.flock(lock, how)
        yield

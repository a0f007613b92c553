"""One job at a time on the device, also while an interrupted runner of an earlier service still winds down."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moegen.errors import Interrupted

_RETRY_S = 0.1


@contextmanager
def device_lock(path: Path, stopping: Callable[[], bool]) -> Iterator[None]:
    """Holds the lock on `path`; waits while another process has it, which the kernel ends when that process does.

    Raises:
        Interrupted: `stopping` said so while it waited.
    """
    with path.open("ab") as lock:
        while not _taken(lock.fileno()):
            if stopping():
                raise Interrupted("stopped on request while it waited for the device; the same command goes on")
            time.sleep(_RETRY_S)
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

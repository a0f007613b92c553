"""Work done ahead of time by a background thread, behind an ordinary iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """`items` in their order, up to `depth` of them made before they are asked for; depth 0 is the plain loop.

    What `items` raises is raised here, in its place. Closing the generator (use `contextlib.closing`) ends the
    thread and closes `items`.
    """
    iterator = iter(items)
    try:
        if depth == 0:
            yield from iterator
            return
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:  # one thread keeps the order
            pending: deque[Future] = deque(pool.submit(next, iterator, _END) for _ in range(depth))
            try:
                while (item := pending.popleft().result()) is not _END:
                    pending.append(pool.submit(next, iterator, _END))
                    yield item
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if isinstance(iterator, Generator):
            iterator.close()

"""`_batch/<job key>/work/`: which row of the table is the first to ask for what, kept for the parts that are committed.

A resumed run does not read the rows of committed parts again, but must know what they asked for, or a later row would
be called the first. So before a part is committed, a file of its number gets the keys of its first rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from moegen.storage import join, list_names, put_create, read_bytes

KEY_BYTES = 16
_MOST_ROWS = 1 << 24  # of the table, from its first on, are remembered: at 24 bytes each, 384 MiB if all differ
_RECENT = 1 << 16
_RUN_ROWS = 1 << 20  # of runs that are joined: while that is done, their 24 MiB are there twice
_FILES_AT_ONCE = 16  # requests in flight, where storage is far away
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])  # the halves of a key, and the row
_Records = npt.NDArray[np.void]

log = logging.getLogger(__name__)


class FirstRows:
    """Key of a row's work -> the first row of the table with that key.

    Memory holds 24 bytes for every different key among the first 16,777,216 rows; a later row is nobody's first, but
    finds those. The newest keys are in a dict, the others in sorted runs, which are joined while they are short.
    """

    def __init__(self) -> None:
        self._recent: dict[bytes, int] = {}
        self._runs: list[_Records] = []

    def find(self, key: bytes) -> int | None:
        """The first row with this key that was added; None when there is none."""
        found = [self._recent[key]] if key in self._recent else []
        high, low = np.frombuffer(key, "<u8")
        for run in self._runs:
            at = int(np.searchsorted(run["high"], high))
            while at < len(run) and run["high"][at] == high:
                if run["low"][at] == low:
                    found.append(int(run["row"][at]))
                at += 1
        return min(found, default=None)

    def add(self, key: bytes, row: int) -> bool:
        """`row` is the first with this key so far; whether it is remembered."""
        if row >= _MOST_ROWS:
            return False
        self._recent[key] = row
        if len(self._recent) >= _RECENT:
            recent, self._recent = self._recent, {}
            self.extend(_records(recent.items()))
        return True

    def extend(self, records: _Records) -> None:
        """Many at once."""
        while self._runs and len(self._runs[-1]) < 2 * len(records) <= _RUN_ROWS:
            records = np.concatenate([self._runs.pop(), records])
        if len(records):
            order = np.argsort(records["high"], kind="stable")
            for half in ("high", "low", "row"):  # one after another: a second copy of all would be as large as all
                records[half] = records[half][order]
            self._runs.append(records)


class StoredFirstRows(FirstRows):
    """The same, with what earlier runs of the job left for their committed parts.

    Args:
        folder: the job's own, see `batch_folder`.
        committed: the numbers of the committed parts.
        rows_per_part: which rows make a part.

    Attributes:
        unknown: committed parts of which nothing is known: their rows must be read again.
    """

    def __init__(self, folder: str, committed: Iterable[int], rows_per_part: int) -> None:
        super().__init__()
        self._folder, self._rows_per_part = join(folder, "work"), rows_per_part
        self._unsaved: dict[int, dict[bytes, int]] = {}  # part -> what `save` will write
        committed = list(committed)
        there = set(list_names(self._folder)) if committed else set()
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="first-rows") as pool:
            read = [*pool.map(lambda part: self._read(_name(part)) if _name(part) in there else None, committed)]
        self.unknown = [part for part, records in zip(committed, read, strict=True) if records is None]
        self.extend(np.concatenate([np.empty(0, _RECORD), *(records for records in read if records is not None)]))

    def add(self, key: bytes, row: int) -> bool:
        if remembered := super().add(key, row):
            self._unsaved.setdefault(row // self._rows_per_part, {})[key] = row
        return remembered

    def save(self, part: int) -> None:
        """The part is about to be committed. Raises `StorageError` when storage refuses."""
        put_create(join(self._folder, _name(part)), _records(self._unsaved.pop(part, {}).items()).tobytes())

    def _read(self, name: str) -> _Records | None:
        data = read_bytes(join(self._folder, name))
        if len(data) % _RECORD.itemsize:
            log.warning("%s: is damaged, the rows of its part are read again", join(self._folder, name))
            return None
        return np.frombuffer(data, _RECORD)


def _name(part: int) -> str:
    return f"{part:06d}.bin"


def _records(items: Iterable[tuple[bytes, int]]) -> _Records:
    pairs = list(items)
    records = np.empty(len(pairs), _RECORD)
    keys = np.frombuffer(b"".join(key for key, _ in pairs), "<u8").reshape(-1, 2)
    records["high"], records["low"], records["row"] = keys[:, 0], keys[:, 1], [row for _, row in pairs]
    return records

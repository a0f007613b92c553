"""`_batch/<job key>/attempts/`: which rows are in the engine, so that a crash leaves behind whom to suspect.

Every file names rows that entered the engine under one epoch of the job's lease. It goes when those rows are done, and
all of an epoch's go when its runner ends in order; so what a later runner finds was left by a crash, and every epoch
that names a row is a mark of that row.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

from moegen.errors import InputError, MoegenError
from moegen.storage import join, list_names, put_create, read_bytes, remove

_CAREFUL_ROWS = 4096  # more than run at once, or are read ahead to be put in order
_NAME = re.compile(r"(\d{6,})-\d{6,}\.json")

log = logging.getLogger(__name__)


class Marks:
    """The marks of one job, as one holder of its lease goes on with them. Thread-safe.

    Args:
        folder: the job's own, see `batch_folder`.
        epoch: of the lease.
        void_epoch: whose marks are removed: its runner has not crashed.

    Attributes:
        crashes: row index -> how often the engine crashed with it.
        careful: something has crashed, so that rows are named before they enter the engine, where otherwise only the
            first are, and others soon after. That holds for the first thousands: whoever was in the engine when it
            crashed, named or not, is among them.
    """

    def __init__(self, folder: str, epoch: int, *, after_crash: bool = False, void_epoch: int | None = None) -> None:
        self._folder, self._epoch = join(folder, "attempts"), epoch
        self._mutex = threading.Lock()
        self._sync = threading.Lock()
        self._unnamed: set[int] = set()  # in the engine, and in no file
        self._named: dict[int, str] = {}  # row in the engine -> the file that names it
        self._files: Counter[str] = Counter()  # file -> how many of its rows are still in the engine
        self._written = self._begun = 0
        self._closed = False
        self.crashes = self._read(void_epoch)
        self.careful = after_crash or bool(self.crashes)

    def begin(self, rows: Collection[int]) -> None:
        """These rows enter the engine."""
        with self._mutex:
            self._begun += len(rows)
            self._unnamed.update(row for row in rows if row not in self._named)
        wary = self.careful and (self._begun <= _CAREFUL_ROWS or not self.crashes.keys().isdisjoint(rows))
        if wary or self._written == 0:
            self.sync()

    def end(self, row: int) -> None:
        """The row left the engine."""
        with self._mutex:
            self._unnamed.discard(row)
            if (name := self._named.pop(row, None)) is not None:
                self._files[name] -= 1

    def sync(self) -> None:
        """Name the rows that are in no file yet, and remove the files whose rows are done.

        Raises:
            StorageError: storage refused.
        """
        with self._sync:
            with self._mutex:
                if self._closed:
                    return
                rows = sorted(self._unnamed)
                done = [name for name, left in self._files.items() if left == 0]
            if rows:
                self._name(rows)
            for name in done:
                remove(join(self._folder, name))
                with self._mutex:
                    del self._files[name]

    def close(self) -> None:
        """The runner ends in order: nobody is to be suspected. Failures are logged."""
        with self._sync:
            with self._mutex:
                self._closed = True
                names = list(self._files)
            try:
                for name in names:
                    remove(join(self._folder, name))
            except MoegenError as error:
                log.warning("rows in flight were not cleared of suspicion: %s", error)

    def _name(self, rows: Sequence[int]) -> None:
        name = f"{self._epoch:06d}-{self._written:06d}.json"
        put_create(join(self._folder, name), (json.dumps({"rows": list(_ranges(rows))}) + "\n").encode())
        self._written += 1
        with self._mutex:
            still = self._unnamed.intersection(rows)
            self._unnamed -= still
            self._named.update(dict.fromkeys(still, name))
            self._files[name] = len(still)

    def _read(self, void_epoch: int | None) -> Counter[int]:
        epochs: dict[int, set[int]] = {}
        for name in list_names(self._folder):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            if int(match[1]) == void_epoch:
                remove(join(self._folder, name))
                continue
            try:
                ranges = json.loads(read_bytes(join(self._folder, name)))["rows"]
                rows = {row for first, stop in ranges for row in range(first, stop)}
            except (ValueError, KeyError, TypeError, InputError) as error:
                log.warning("%s: names no rows, and is passed over: %s", join(self._folder, name), error)
                continue
            epochs.setdefault(int(match[1]), set()).update(rows)
        return Counter(row for rows in epochs.values() for row in rows)


def _ranges(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sorted rows as `[first, stop)`."""
    for _, run in groupby(enumerate(rows), lambda item: item[1] - item[0]):
        members = [row for _, row in run]
        yield members[0], members[-1] + 1

"""What a crash must not take, kept on storage by a thread beside the one that runs the job."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from moegen.errors import MoegenError
from moegen.job.marks import Marks
from moegen.row import RowResult
from moegen.table.journal import Journal
from moegen.table.lease import Lease
from moegen.table.writer import TableWriter

_TICK_S = 0.2  # until a request to stop is seen
_NAME_S = 1.0  # between two files that name rows in the engine
_HANDOVER_S = 8.0  # a pass may take this long to end once asked; then the lease is released without waiting for it

log = logging.getLogger(__name__)


class Keeper:
    """Journals finished rows every few seconds and names the rows in the engine. Use it in a `with`.

    Asked to stop, it saves at once what is finished, and goes on saving until the job's thread has ended; where that
    takes too long it releases the lease. At the end of the block everything finished is saved, whatever happened; the
    rows in the engine are suspects only if it was the engine that failed.

    Args:
        journal, marks, lease: of the job.
        writer: says which rows need no journal.
        every_s: between two journal files.
        stopping: whether the job was asked to stop.
    """

    def __init__(
        self,
        journal: Journal,
        marks: Marks,
        lease: Lease,
        writer: TableWriter,
        every_s: float,
        stopping: Callable[[], bool],
    ) -> None:
        self._journal, self._marks, self._lease = journal, marks, lease
        self._writer, self._every_s, self._stopping = writer, every_s, stopping
        self._finished: list[RowResult] = []
        self._mutex = threading.Lock()
        self._saving = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._thread.join()
        if error is None or _in_order(error):
            self._marks.close()
        try:
            self.save()
        except MoegenError as problem:
            if error is None:
                raise
            log.warning("finished rows were not saved: %s", problem)

    @property
    def rows_journaled(self) -> int:
        """How many finished rows are in the journal and in no part."""
        return self._journal.rows(self._writer.is_committed)

    def begin(self, rows: Sequence[int]) -> None:
        """These rows enter the engine."""
        self._marks.begin(rows)

    def end(self, result: RowResult) -> None:
        """The row left the engine with this result."""
        with self._mutex:
            self._finished.append(result)
        self._marks.end(result.row_index)

    def save(self) -> None:
        """Everything finished is on storage after this.

        Raises:
            Interrupted: the lease is lost.
            StorageError: storage refused; what was not saved will be tried again.
        """
        with self._saving:
            with self._mutex:
                finished, self._finished = self._finished, []
            missing = [result for result in finished if not self._writer.is_committed(result.row_index, 1)]
            try:
                if missing:
                    self._lease.check()
                    self._journal.write(missing)
                self._journal.prune(self._writer.is_committed)
            except MoegenError:
                self._put_back(missing)
                raise

    def _put_back(self, results: Iterable[RowResult]) -> None:
        with self._mutex:
            self._finished[:0] = results

    def _keep(self) -> None:
        saved = named = time.monotonic()
        asked: float | None = None
        while not self._ended.wait(min(_TICK_S, self._every_s)):
            now = time.monotonic()
            if asked is None and self._stopping():
                asked = now
                self._marks.close()  # however it ends now, it is no row's fault
            if now - named >= _NAME_S:
                self._try(self._marks.sync)
                named = now
            if asked is not None or now - saved >= self._every_s:
                self._try(self.save)
                saved = now
            if asked is not None and now - asked >= _HANDOVER_S:
                self._lease.release()
                return

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except MoegenError as error:  # the job's thread meets it too, at its next commit
            log.warning("not saved, but tried again: %s", error)


def _in_order(error: BaseException) -> bool:
    """Whether the job was ended by something that no row in the engine can be blamed for."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, MoegenError) and error.exit_code != MoegenError.exit_code
    )

"""The keeper: finished rows reach storage, whatever ends the job, and rows are suspected only when the engine fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from moegen.errors import Interrupted, MoegenError, StorageError
from moegen.job.keeper import Keeper
from moegen.job.marks import Marks
from moegen.row import RowResult, Status
from moegen.spec import Output
from moegen.table.journal import Journal
from moegen.table.lease import Lease
from moegen.table.reader import RowBatch
from moegen.table.writer import TableWriter

FINGERPRINT = "0123456789abcdef" * 4


class Kept:
    """A keeper over a table of 20 rows in parts of ten, all of them handed to the engine."""

    def __init__(self, folder: Path, every_s: float, stopping: Callable[[], bool] = lambda: False) -> None:
        self.folder = folder / "_batch/key"
        self.lease = Lease(str(self.folder), 60.0)
        self.writer = TableWriter(
            Output(str(folder), rows_per_part=10), pa.schema([]), 20, FINGERPRINT, "key", self.lease
        )
        self.writer.add_batch(RowBatch(0, pa.table({}), "file", [{}] * 20))
        self.journal = Journal(str(self.folder), self.lease.epoch, FINGERPRINT, 10)
        marks = Marks(str(self.folder), self.lease.epoch)
        self.keeper = Keeper(self.journal, marks, self.lease, self.writer, every_s, stopping)

    @contextmanager
    def running(self) -> Iterator[Keeper]:
        with self.lease, self.keeper:
            self.keeper.begin(range(20))
            yield self.keeper

    def end(self, *rows: int) -> None:
        for row in rows:
            result = RowResult(row, Status.OK, f"answer {row}", attempts=1)
            self.keeper.end(result)
            self.writer.add(result)

    @property
    def journaled(self) -> list[int]:
        journal = Journal(str(self.folder), 99, FINGERPRINT, 10)
        return sorted(journal.read(lambda first_row, rows: False))

    @property
    def suspects(self) -> list[int]:
        return sorted(Marks(str(self.folder), 99).crashes)


def wait_for(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_finished_rows_are_saved_while_the_job_runs(tmp_path: Path) -> None:
    kept = Kept(tmp_path, every_s=0.1)
    with kept.running() as keeper:
        kept.end(3, 14)
        wait_for(lambda: keeper.rows_journaled == 2)  # counted once they are written
        assert kept.journaled == [3, 14]
        kept.end(*(row for row in range(10) if row != 3))  # which makes a part
        assert keeper.rows_journaled == 1
        kept.end(15)
        wait_for(lambda: kept.journaled[-1] == 15)
    assert {row for row in kept.journaled if row >= 10} == {14, 15}
    assert kept.suspects == []


def test_rows_of_committed_parts_need_no_journal(tmp_path: Path) -> None:
    kept = Kept(tmp_path, every_s=60)
    with kept.running():
        kept.end(*range(12))
    assert kept.journaled == [10, 11]


@pytest.mark.parametrize(
    ("error", "suspected"),
    [
        (Interrupted("asked"), False),
        (StorageError("refused"), False),
        (KeyboardInterrupt(), False),
        (RuntimeError("a device that has failed"), True),
        (MoegenError("a bug"), True),
        (MemoryError(), True),
    ],
)
def test_whatever_ends_the_job_finished_rows_are_saved_and_only_the_engine_is_suspected(
    tmp_path: Path, error: BaseException, suspected: bool
) -> None:
    kept = Kept(tmp_path, every_s=60)

    def run() -> None:
        with kept.running():
            kept.end(1, 2)
            raise error

    with pytest.raises(type(error)):
        run()
    assert kept.journaled == [1, 2]
    assert bool(kept.suspects) == suspected
    assert kept.lease.epoch == 1


def test_storage_that_refuses_for_a_while_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(tmp_path, every_s=0.1)
    in_the_way = kept.folder / "journal"
    with caplog.at_level(logging.WARNING), kept.running():
        in_the_way.write_text("")
        kept.end(1)
        wait_for(lambda: "not saved, but tried again" in caplog.text)
        in_the_way.unlink()
        kept.end(2)
        wait_for(lambda: kept.journaled == [1, 2])


def test_storage_that_refuses_at_the_end_is_an_error(tmp_path: Path) -> None:
    kept = Kept(tmp_path, every_s=60)

    def run() -> None:
        with kept.running():
            (kept.folder / "journal").write_text("")
            kept.end(1)

    with pytest.raises(StorageError):
        run()


def test_a_lost_lease_saves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(tmp_path, every_s=60)

    def run() -> None:
        with kept.running():
            kept.end(1)
            (kept.folder / "lease-000002.json").write_text("{}")
            kept.end(*range(2, 10), 0)  # which would make a part

    with pytest.raises(Interrupted, match="took this job over"):
        run()
    assert kept.journaled == []
    assert not list(tmp_path.glob("part-*"))
    assert "finished rows were not saved" in caplog.text


def test_asked_to_stop_it_saves_at_once_and_clears_everybody(tmp_path: Path) -> None:
    asked: list[bool] = []
    kept = Kept(tmp_path, every_s=60, stopping=lambda: bool(asked))
    with kept.running():
        kept.end(1)
        assert len(kept.suspects) == 20
        asked.append(True)
        wait_for(lambda: kept.journaled == [1] and kept.suspects == [])

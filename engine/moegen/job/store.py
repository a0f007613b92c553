"""The service's jobs on disk, one folder each.

<state>/service.lock          held by the service that owns the folder
<state>/device.lock           held by the runner that uses the device
<state>/jobs/<key>/record.json
                   job.yaml          the specification of the latest attempt
                   status.<n>.json   what the runner of attempt n tells
                   log.txt           what all attempts printed
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO

from moegen.errors import MoegenError, SpecError, StorageError
from moegen.job import records
from moegen.job.records import Record
from moegen.job.samples import Point, joined
from moegen.job.status import RunnerStatus
from moegen.spec import JobSpec, JobState
from moegen.storage import put_replace
from moegen.units import MIB

_MOST_ATTEMPTS = 20  # whose samples are read
_TAIL_LIMIT_BYTES = 4 * MIB  # of a log's end


class JobStore:
    """All jobs of one state folder, in memory and on disk; every change is on disk before it is seen. Thread-safe.

    Use it in a `with`: it holds the folder's lock. Jobs that were running when the last service ended are queued.

    Raises:
        SpecError: another service uses the folder.
        StorageError: the folder cannot be written, or a record in it is damaged.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._jobs_dir = state_dir / "jobs"
        self._mutex = threading.Lock()
        self._records: dict[str, Record] = {}
        self._asked: dict[str, float] = {}  # when a job was last asked about, in Unix seconds
        self._opened_at = time.time()
        self._lock_file = _locked(state_dir)
        try:
            self._recover()
        except MoegenError:
            self._lock_file.close()
            raise

    def __enter__(self) -> JobStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock_file.close()

    def submit(self, key: str, spec: JobSpec, owner: int, now: float) -> tuple[Record, bool]:
        """The job under `key`, and whether it is new. Raises as `records.new` and `records.submit`."""
        with self._mutex:
            self._asked[key] = now
            known = self._records.get(key)
            record = records.submit(known, spec, owner, now) if known else records.new(key, spec, owner, now)
            return self._save(record), known is None

    def update(self, key: str, change: Callable[[Record], Record]) -> Record:
        """The record after `change`. Raises `KeyError` when there is no such job."""
        with self._mutex:
            return self._save(change(self._records[key]))

    def ask(self, key: str, now: float) -> Record | None:
        """The job as `get` has it, for somebody who watches it: its lease begins anew, and a pause ends."""
        with self._mutex:
            if (record := self._records.get(key)) is None:
                return None
            self._asked[key] = now
            return self._save(records.ask(record, now))

    def pause_unwatched(self, now: float) -> list[Record]:
        """Pauses the jobs that nobody asked about for as long as their leases, and says which."""
        with self._mutex:
            late = [record for record in self._records.values() if self._unwatched(record, now)]
            return [self._save(records.pause(record)) for record in late]

    def _unwatched(self, record: Record, now: float) -> bool:
        hours = record.spec["job"].get("lease_hours")
        if hours is None or record.state not in (JobState.QUEUED, JobState.RUNNING):
            return False
        return now - self._asked.get(record.key, self._opened_at) > 3600 * hours

    def start_next(self, now: float) -> Record | None:
        """Take the first job in the queue out of it, as running."""
        with self._mutex:
            queue = self._queue()
            return self._save(records.start(queue[0], now)) if queue else None

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def all(self) -> list[Record]:
        """Every job, oldest first."""
        with self._mutex:
            return sorted(self._records.values(), key=lambda record: (record.created_at, record.key))

    def queue(self) -> list[Record]:
        """The jobs that wait, the next one first."""
        with self._mutex:
            return self._queue()

    def status(self, record: Record) -> RunnerStatus:
        """What the job's latest runner tells; while an attempt has told nothing yet, what the one before told."""
        for attempt in (record.attempts, record.attempts - 1):
            status = RunnerStatus.read(self.status_file(record.key, attempt))
            if status != RunnerStatus():
                return status
        return RunnerStatus()

    def samples(self, record: Record) -> list[Point]:
        """The course of the job over its latest attempts: see `joined`."""
        first = max(1, record.attempts - _MOST_ATTEMPTS + 1)
        statuses = (
            RunnerStatus.read(self.status_file(record.key, attempt)) for attempt in range(first, record.attempts + 1)
        )
        return joined(status.detail.get("samples", ()) for status in statuses)

    def log_tail(self, record: Record, lines: int) -> str:
        """The last lines of what the job's runners printed, of at most 4 MiB; nothing before there is any."""
        path = self.log_file(record.key)
        if lines == 0 or not path.exists():
            return ""
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_LIMIT_BYTES))
            tail = deque(file, maxlen=lines)
        return b"".join(tail).decode(errors="replace")

    def log_after(self, record: Record, offset: int) -> tuple[bytes, int]:
        """Whole lines that the runners printed after the first `offset` bytes, 1 MiB at most, and where they end.

        Nothing, and the end of the log, for an `offset` below 0: where one begins who wants what comes from now on.
        """
        path = self.log_file(record.key)
        size = path.stat().st_size if path.exists() else 0
        if offset < 0 or offset >= size:
            return b"", size
        with path.open("rb") as file:
            file.seek(offset)
            lines = file.read(MIB)
        # A line that is still being written is left for the next time, unless it is longer than any line should be.
        whole = lines if len(lines) == MIB and b"\n" not in lines else lines[: lines.rfind(b"\n") + 1]
        return whole, offset + len(whole)

    def observed(self, record: Record) -> Record:
        """The record with what its latest runner had done."""
        status = RunnerStatus.read(self.status_file(record.key, record.attempts))
        stage = (status.progress or {}).get("stage", "starting")
        return records.observe(record, status.rows_saved, stage)

    def job_file(self, key: str) -> Path:
        return self._jobs_dir / key / "job.yaml"

    def status_file(self, key: str, attempt: int) -> Path:
        return self._jobs_dir / key / f"status.{attempt}.json"

    def log_file(self, key: str) -> Path:
        return self._jobs_dir / key / "log.txt"

    def _recover(self) -> None:
        for path in sorted(self._jobs_dir.glob("*/record.json")):
            record = _read(path)
            self._records[record.key] = record
            self.update(record.key, lambda record: records.requeue(self.observed(record)))

    def _queue(self) -> list[Record]:
        waiting = [record for record in self._records.values() if record.state is JobState.QUEUED]
        return sorted(waiting, key=lambda record: (record.queued_at, record.key))

    def _save(self, record: Record) -> Record:
        if self._records.get(record.key) != record:
            put_replace(str(self._jobs_dir / record.key / "record.json"), json.dumps(asdict(record)).encode())
            self._records[record.key] = record
        return record


def _locked(state_dir: Path) -> IO[bytes]:
    try:
        (state_dir / "jobs").mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "service.lock").open("ab")
    except OSError as error:
        raise StorageError(f"--state-dir: {str(state_dir)!r} cannot be written: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise SpecError(
            f"--state-dir: another service uses {str(state_dir)!r}; stop it or give another folder"
        ) from error
    return lock


def _read(path: Path) -> Record:
    try:
        values = json.loads(path.read_bytes())
        return Record(**{**values, "state": JobState(values["state"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{path}: is not a job record of this version: {error}; move the job's folder away"
        ) from error

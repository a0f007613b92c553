"""The child process that runs a job, and the thread that starts one after the other."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import yaml

from moegen.errors import MoegenError
from moegen.job import records
from moegen.job.records import Record
from moegen.job.status import RunnerStatus
from moegen.job.store import JobStore
from moegen.spec import JobState
from moegen.storage import put_replace

_POLL_S = 0.2
_GRACE_S = 30.0  # between asking a runner to stop and ending it: a pass over a large model takes a while

log = logging.getLogger(__name__)


class Runner:
    """One attempt of one job, started with the command that a person would type. Use it in a `with`.

    The runner's standard input is a pipe that nobody writes to: when this process goes, however it goes, the
    runner reads the end of it and stops too.
    """

    def __init__(self, store: JobStore, record: Record) -> None:
        self.record = record
        self.status_file = store.status_file(record.key, record.attempts)
        job_file = store.job_file(record.key)
        put_replace(str(job_file), yaml.safe_dump(record.runner_spec, allow_unicode=True).encode())
        command = [
            *(sys.executable, "-m", "moegen", "run", str(job_file), "--status-file", str(self.status_file)),
            *("--device-lock", str(store.state_dir / "device.lock"), "--stop-on-stdin-eof", "--debug"),
        ]
        with _appended(store.log_file(record.key), record) as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the service's terminal is for the service alone
            )
        self._asked_at: float | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def exit_code(self, wait_s: float) -> int | None:
        """None while it runs; negative for a signal."""
        try:
            return self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None

    def interrupt(self) -> None:
        """Ask it to stop; asked again after the grace period, end it."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._process.terminate()
        elif now - self._asked_at > _GRACE_S:
            self._process.kill()


def _appended(path: Path, record: Record) -> IO[bytes]:
    stream = path.open("ab")
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.started_at))
    stream.write(f"--- attempt {record.attempts}, {started}\n".encode())
    stream.flush()
    return stream


class Supervisor:
    """Runs the store's jobs, one at a time, in the order in which they were queued. Use it in a `with`.

    Leaving interrupts the runner; its job goes back to its place in the queue, for the next service.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor")

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    def wake(self) -> None:
        """A job may have been queued."""
        self._wake.set()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self._pause_unwatched()
            record = self._store.start_next(time.time())
            if record is None:
                self._wake.wait()
            else:
                self._attempt(record)

    def _attempt(self, record: Record) -> None:
        log.info("job %s: attempt %d begins", record.key, record.attempts)
        try:
            with Runner(self._store, record) as runner:
                exit_code = self._wait(runner)
                error = RunnerStatus.read(runner.status_file).error
        except (OSError, MoegenError) as problem:  # no process, no disk: the job's trouble, not the service's
            exit_code, error = MoegenError.exit_code, f"the runner could not be run: {problem}"
        after = self._store.update(record.key, lambda now: self._ended(now, record.attempts, exit_code, error))
        log.info("job %s: attempt %d ended with code %d: %s", record.key, record.attempts, exit_code, after.state.value)

    def _wait(self, runner: Runner) -> int:
        while (exit_code := runner.exit_code(_POLL_S)) is None:
            self._pause_unwatched()
            if self._stopping.is_set() or not self._wanted(runner.record):
                runner.interrupt()
        return exit_code

    def _pause_unwatched(self) -> None:
        for record in self._store.pause_unwatched(time.time()):
            hours = record.spec["job"]["lease_hours"]
            log.info("job %s: paused: nobody asked about it for job.lease_hours, %g", record.key, hours)

    def _wanted(self, started: Record) -> bool:
        """Whether this attempt is still the job's: it may have been ended, and asked for again, meanwhile."""
        now = self._store.get(started.key)
        return now is not None and now.state is JobState.RUNNING and now.attempts == started.attempts

    def _ended(self, record: Record, attempt: int, exit_code: int, error: str | None) -> Record:
        record = self._store.observed(record)
        if self._stopping.is_set() and exit_code != 0:
            return records.requeue(record)
        return records.end_attempt(record, attempt, exit_code, error, time.time())

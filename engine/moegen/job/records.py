"""A job as the service knows it, and every change that it can go through, as functions without side effects.

Invariants:
- A job ends once: nothing but a new request takes it out of an ended state, and a runner's exit counts only while
  its own attempt is the one that runs.
- A request from an older owner changes nothing.
- Jobs run in the order in which they were queued; an interrupted job keeps its place.
- A job with a lease that nobody asks about does not hold the device: it is paused, and queued again when asked for.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from typing import Any

from moegen.errors import Interrupted, MoegenError, SpecError
from moegen.spec import JOB_KEY, JobSpec, JobState
from moegen.table.fingerprint import CIRCUMSTANCES

MAX_BARREN_ATTEMPTS = 5  # runners lost in a row, without a row saved, before the job fails; a poison row takes four


class KeyConflict(MoegenError):
    """The key belongs to another specification."""


@dataclass(frozen=True)
class Record:
    """One job. Times are Unix times in seconds."""

    key: str
    spec: dict[str, Any]  # `JobSpec.to_mapping`
    owner: int
    created_at: float
    queued_at: float
    state: JobState = JobState.QUEUED
    started_at: float | None = None  # of the latest attempt
    ended_at: float | None = None
    attempts: int = 0  # runners started
    barren_attempts: int = 0  # lost in a row without progress
    rows_saved: int = 0  # by the attempts before this one
    output_begun: bool = False  # an attempt has opened the output: the next one resumes, also in mode new_run
    exit_code: int | None = None
    error: str | None = None

    @property
    def runner_spec(self) -> dict[str, Any]:
        """The specification for the next attempt."""
        if not self.output_begun:
            return self.spec
        return {**self.spec, "output": {**self.spec["output"], "mode": "create"}}


def check_key(key: str) -> None:
    """Raises `SpecError` when `key` cannot name a job."""
    if not JOB_KEY.fullmatch(key):
        raise SpecError(
            f"key: {key!r} cannot name a job; give 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or a digit"
        )


def new(key: str, spec: JobSpec, owner: int, now: float) -> Record:
    """A job that nobody has asked for before."""
    check_key(key)
    named = replace(spec, job=replace(spec.job, key=key))
    return Record(key, named.to_mapping(), owner, created_at=now, queued_at=now)


def submit(record: Record, spec: JobSpec, owner: int, now: float) -> Record:
    """The same job asked for again: a newer owner takes it over, and one that does not run or wait resumes.

    Circumstances that the newer owner asks for (its memory budget, its rules for failed rows) hold from the next
    attempt on.

    Raises:
        KeyConflict: `spec` asks for other work than the record's.
    """
    if work_of(JobSpec.from_mapping(record.spec)) != work_of(spec):
        raise KeyConflict(f"key: {record.key!r} belongs to another specification; use another key")
    if owner < record.owner:
        return record
    record = replace(record, owner=owner, spec=_taken_over(record.spec, spec))
    if record.state not in (JobState.FAILED, JobState.CANCELLED, JobState.PAUSED):
        return record
    return replace(
        record, state=JobState.QUEUED, queued_at=now, ended_at=None, exit_code=None, error=None, barren_attempts=0
    )


def work_of(spec: JobSpec) -> str:
    """What a key stands for, as JSON: not who asks, under which circumstances, or whether to clear the output first."""
    mapping = {name: value for name, value in spec.to_mapping().items() if name not in CIRCUMSTANCES}
    mapping["output"] = {name: value for name, value in mapping["output"].items() if name != "mode"}
    return json.dumps(mapping, sort_keys=True, separators=(",", ":"))


def _taken_over(old: dict[str, Any], spec: JobSpec) -> dict[str, Any]:
    new = spec.to_mapping()
    circumstances = {name: new[name] for name in CIRCUMSTANCES if name != "job"}
    return {**old, **circumstances, "job": {**old["job"], "lease_hours": new["job"]["lease_hours"]}}


def pause(record: Record) -> Record:
    """Nobody asked about the job for as long as its lease: what it has stays, and others may run."""
    return replace(record, state=JobState.PAUSED) if record.state in (JobState.QUEUED, JobState.RUNNING) else record


def ask(record: Record, now: float) -> Record:
    """Somebody asked about the job: one that was paused goes to the end of the queue."""
    return replace(record, state=JobState.QUEUED, queued_at=now) if record.state is JobState.PAUSED else record


def cancel(record: Record, owner: int, now: float) -> Record:
    """The job ended on request, unless it has ended or `owner` is older than the job's."""
    if record.state.ended or owner < record.owner:
        return record
    return replace(record, state=JobState.CANCELLED, ended_at=now)


def start(record: Record, now: float) -> Record:
    """A queued job's next attempt."""
    return replace(record, state=JobState.RUNNING, started_at=now, attempts=record.attempts + 1)


def requeue(record: Record) -> Record:
    """The service stopped, or was stopped, while the job ran: nobody's fault, and the job keeps its place."""
    return replace(record, state=JobState.QUEUED) if record.state is JobState.RUNNING else record


def observe(record: Record, rows_saved: int, stage: str) -> Record:
    """What the latest attempt had done when it ended."""
    begun = record.output_begun or stage != "starting"
    progressed = rows_saved > record.rows_saved
    return replace(
        record,
        output_begun=begun,
        rows_saved=max(rows_saved, record.rows_saved),
        barren_attempts=0 if progressed else record.barren_attempts,
    )


def end_attempt(record: Record, attempt: int, exit_code: int, error: str | None, now: float) -> Record:
    """The runner of `attempt` exited: negative codes are signals, as `subprocess` gives them.

    A runner that was lost (by a signal, or interrupted by someone else) is started again, but not for ever.
    """
    if record.state is not JobState.RUNNING or record.attempts != attempt:
        return record
    if exit_code == 0:
        return replace(record, state=JobState.SUCCEEDED, ended_at=now, exit_code=0)
    if exit_code < 0 or exit_code == Interrupted.exit_code:
        record = replace(record, barren_attempts=record.barren_attempts + 1)
        if record.barren_attempts < MAX_BARREN_ATTEMPTS:
            return requeue(record)
        why = error if error is not None and exit_code == Interrupted.exit_code else _lost(exit_code)
        error = f"{why}, {record.barren_attempts} times in a row without progress"
    return replace(
        record, state=JobState.FAILED, ended_at=now, exit_code=exit_code, error=error or _unexplained(exit_code)
    )


def _lost(exit_code: int) -> str:
    if exit_code == Interrupted.exit_code:
        return "the runner was interrupted"
    hint = "; the machine may be out of memory: lower engine.host_memory" if -exit_code == signal.SIGKILL else ""
    return f"the runner was ended by signal {-exit_code} ({signal.strsignal(-exit_code)}){hint}"


def _unexplained(exit_code: int) -> str:
    return f"the runner ended with exit code {exit_code} and no message; its log has the rest"

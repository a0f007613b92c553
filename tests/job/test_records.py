from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from moegen.errors import SpecError
from moegen.job import records
from moegen.job.records import MAX_BARREN_ATTEMPTS, KeyConflict, Record
from moegen.spec import JobSpec, JobState

SPEC: dict[str, Any] = {
    "input": {"uri": "in.parquet"},
    "prompt": {"column": "p"},
    "model": {"uri": "model"},
    "sampling": {"max_tokens": 8},
    "output": {"uri": "out", "mode": "new_run"},
}


def job(**sampling: Any) -> JobSpec:
    return JobSpec.from_mapping({**SPEC, "sampling": {"max_tokens": 8, **sampling}})


def queued(owner: int = 0) -> Record:
    return records.new("key", job(), owner, now=1.0)


def running(owner: int = 0) -> Record:
    return records.start(queued(owner), now=2.0)


def ended(state: JobState) -> Record:
    return replace(running(owner=1), state=state, ended_at=3.0, exit_code=70, error="why", barren_attempts=2)


@pytest.mark.parametrize("key", ["", ".", "..", "-a", "a/b", "a b", "é", "a" * 129, "a\n"])
def test_keys_that_cannot_be_folder_names_are_refused(key: str) -> None:
    with pytest.raises(SpecError, match="cannot name a job"):
        records.new(key, job(), 0, 1.0)


@pytest.mark.parametrize("key", ["a", "0", "A.b_c-9", "a" * 128])
def test_good_keys(key: str) -> None:
    assert records.new(key, job(), 0, 1.0).key == key


@pytest.mark.parametrize("record", [queued(1), running(1), ended(JobState.SUCCEEDED)])
def test_asking_again_attaches(record: Record) -> None:
    assert records.submit(record, job(), 1, 9.0) == record
    assert records.submit(record, job(), 5, 9.0) == replace(record, owner=5)


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.PAUSED])
def test_asking_again_resumes_what_did_not_succeed(state: JobState) -> None:
    again = records.submit(ended(state), job(), 1, 9.0)
    assert (again.state, again.queued_at, again.created_at, again.attempts) == (JobState.QUEUED, 9.0, 1.0, 1)
    assert (again.ended_at, again.exit_code, again.error, again.barren_attempts) == (None, None, None, 0)


def test_an_older_owner_changes_nothing() -> None:
    assert records.submit(ended(JobState.CANCELLED), job(), 0, 9.0) == ended(JobState.CANCELLED)
    assert records.cancel(running(owner=2), 1, 9.0) == running(owner=2)


def test_a_newer_owner_brings_its_circumstances() -> None:
    asked = {
        "errors": {"max_failed_rows": 3},
        "engine": {"host_memory": "1GiB"},
        "job": {"name": "n", "lease_hours": 2},
    }
    again = records.submit(running(owner=1), JobSpec.from_mapping({**SPEC, **asked}), 2, 9.0)
    assert again.state is JobState.RUNNING
    assert (again.spec["errors"]["max_failed_rows"], again.spec["engine"]["host_memory"]) == (3, "1GiB")
    assert again.spec["job"] == {"name": "", "key": "key", "lease_hours": 2.0}
    cleared = JobSpec.from_mapping({**SPEC, "output": {"uri": "out", "mode": "create"}})
    assert records.submit(queued(), cleared, 1, 9.0).spec["output"]["mode"] == "new_run"  # once decided


def test_a_pause_ends_when_somebody_asks() -> None:
    for record in (queued(1), running(1)):
        paused = records.pause(record)
        assert (paused.state, paused.owner) == (JobState.PAUSED, 1)
        assert records.end_attempt(paused, paused.attempts, 75, None, 8.0) == paused
        assert records.ask(paused, 9.0) == replace(record, state=JobState.QUEUED, queued_at=9.0)
        assert records.cancel(paused, 1, 9.0).state is JobState.CANCELLED
    for record in (ended(JobState.SUCCEEDED), ended(JobState.FAILED)):
        assert records.pause(record) == records.ask(record, 9.0) == record


def test_another_specification_is_a_conflict_whoever_asks() -> None:
    with pytest.raises(KeyConflict, match="another specification"):
        records.submit(queued(), job(max_tokens=9), 0, 9.0)
    renamed = JobSpec.from_mapping({**SPEC, "job": {"name": "other", "key": "other"}})
    assert records.submit(queued(), renamed, 0, 9.0) == queued()


def test_cancel() -> None:
    for record in (queued(1), running(1)):
        assert records.cancel(record, 1, 9.0) == replace(record, state=JobState.CANCELLED, ended_at=9.0)
        assert records.cancel(record, 2, 9.0).state is JobState.CANCELLED
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        assert records.cancel(ended(state), 9, 9.0) == ended(state)


def test_success_and_failure() -> None:
    good = records.end_attempt(running(), 1, 0, None, 9.0)
    assert (good.state, good.ended_at, good.exit_code, good.error) == (JobState.SUCCEEDED, 9.0, 0, None)
    bad = records.end_attempt(running(), 1, 65, "no such column", 9.0)
    assert (bad.state, bad.ended_at, bad.exit_code, bad.error) == (JobState.FAILED, 9.0, 65, "no such column")
    mute = records.end_attempt(running(), 1, 3, None, 9.0)
    assert mute.error == "the runner ended with exit code 3 and no message; its log has the rest"


def test_an_exit_counts_only_for_the_attempt_that_runs() -> None:
    cancelled = records.cancel(running(), 0, 5.0)
    assert records.end_attempt(cancelled, 1, 0, None, 9.0) == cancelled
    asked_again = records.submit(cancelled, job(), 0, 6.0)
    assert records.end_attempt(asked_again, 1, 75, None, 9.0) == asked_again
    second = records.start(asked_again, 7.0)
    assert records.end_attempt(second, 1, 75, None, 9.0) == second
    assert records.end_attempt(second, 2, 0, None, 9.0).state is JobState.SUCCEEDED


@pytest.mark.parametrize("exit_code", [-9, -11, 75])
def test_a_lost_runner_is_started_again_as_long_as_a_poison_row_may_take(exit_code: int) -> None:
    record = queued()
    for attempt in range(1, MAX_BARREN_ATTEMPTS + 1):
        assert record.state is JobState.QUEUED
        record = records.end_attempt(records.start(record, 2.0), attempt, exit_code, None, 9.0)
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert "5 times in a row without progress" in record.error


def test_progress_starts_the_count_again() -> None:
    record = queued()
    for attempt in range(1, 8):
        record = records.observe(records.start(record, 2.0), 100 * attempt, "running")
        record = records.end_attempt(record, attempt, -9, None, 9.0)
        assert record.state is JobState.QUEUED


def test_a_stopped_service_costs_the_job_nothing() -> None:
    record = records.requeue(running())
    assert (record.state, record.barren_attempts, record.queued_at) == (JobState.QUEUED, 0, 1.0)
    assert records.requeue(ended(JobState.FAILED)) == ended(JobState.FAILED)


def test_a_new_run_starts_over_only_once() -> None:
    assert running().runner_spec["output"]["mode"] == "new_run"
    assert records.observe(running(), 0, "starting").runner_spec["output"]["mode"] == "new_run"
    assert records.observe(running(), 0, "loading").runner_spec["output"]["mode"] == "create"

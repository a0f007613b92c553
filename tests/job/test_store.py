from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from moegen.errors import SpecError, StorageError
from moegen.job import records
from moegen.job.status import RunnerStatus
from moegen.job.store import JobStore
from moegen.spec import Job, JobSpec, JobState

SPEC = JobSpec.from_mapping(
    {
        "input": {"uri": "in.parquet"},
        "prompt": {"template": "{a} 😀"},
        "model": {"uri": "model"},
        "sampling": {"max_tokens": 8, "min_p": 1e-5},
        "output": {"uri": "out"},
    }
)


def test_jobs_survive_the_service(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store:
        for number, key in enumerate(("first", "second", "third")):
            assert store.submit(key, SPEC, owner=number, now=float(number))[1]
        assert not store.submit("first", SPEC, owner=7, now=9.0)[1]
        assert store.start_next(5.0) == store.get("first")
        store.update("second", lambda record: records.cancel(record, 9, 6.0))
    with JobStore(tmp_path) as store:
        states = [(record.key, record.state, record.owner, record.attempts) for record in store.all()]
        assert states == [
            ("first", JobState.QUEUED, 7, 1),
            ("second", JobState.CANCELLED, 1, 0),
            ("third", JobState.QUEUED, 2, 0),
        ]
        assert [record.key for record in store.queue()] == ["first", "third"]
        assert JobSpec.from_mapping(store.all()[0].spec) == replace(SPEC, job=Job(key="first"))


def test_a_recovered_job_knows_what_its_lost_runner_did(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store:
        store.submit("job", SPEC, 0, 1.0)
        store.start_next(2.0)
        RunnerStatus({"stage": "running", "rows_saved": 40}).write(store.status_file("job", 1))
    with JobStore(tmp_path) as store:
        (record,) = store.all()
        assert (record.state, record.rows_saved, record.output_begun) == (JobState.QUEUED, 40, True)
        assert store.status(record).rows_saved == 40
        store.start_next(3.0)
        (record,) = store.all()
        assert store.status(record).rows_saved == 40  # until the new runner tells something itself
        RunnerStatus({"stage": "starting", "rows_saved": 0}).write(store.status_file("job", 2))
        assert store.status(record).rows_saved == 0


def test_jobs_with_a_lease_are_paused_when_nobody_asks(tmp_path: Path) -> None:
    leased = replace(SPEC, job=Job(lease_hours=1.0))
    with JobStore(tmp_path) as store:
        store.submit("watched", leased, 0, now=0.0)
        store.submit("left", leased, 0, now=0.0)
        store.submit("without", SPEC, 0, now=0.0)
        store.start_next(1.0)
        assert store.pause_unwatched(3600.0) == []
        asked = store.ask("watched", 3000.0)
        assert asked is not None
        assert [record.key for record in store.pause_unwatched(3601.0)] == ["left"]
        assert [record.key for record in store.queue()] == ["watched", "without"] or asked.state is JobState.RUNNING
        assert store.pause_unwatched(3602.0) == []
        left = store.ask("left", 4000.0)
        assert left is not None
        assert (left.state, left.queued_at) == (JobState.QUEUED, 4000.0)
        assert store.ask("unknown", 1.0) is None
    with JobStore(tmp_path) as store:  # after a restart everybody has a whole lease to come back
        assert store.pause_unwatched(time.time() + 1) == []


def test_logs_from_an_offset(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store:
        record, _ = store.submit("job", SPEC, 0, 1.0)
        assert store.log_after(record, 0) == store.log_after(record, -1) == (b"", 0)
        store.log_file("job").write_bytes("één\ntwo\nhalf a li".encode())
        whole = len("één\ntwo\n".encode())
        assert store.log_after(record, 0) == ("één\ntwo\n".encode(), whole)
        assert store.log_after(record, whole) == (b"", whole)
        assert store.log_after(record, -1) == (b"", whole + len("half a li"))
        assert store.log_after(record, 10**9)[0] == b""
        store.log_file("job").write_bytes(b"x" * (3 << 20))
        assert [len(store.log_after(record, offset)[0]) for offset in (0, 5 << 19)] == [1 << 20, 0]


def test_one_service_per_folder(tmp_path: Path) -> None:
    with JobStore(tmp_path), pytest.raises(SpecError, match="another service uses"):
        JobStore(tmp_path)
    with JobStore(tmp_path):
        pass


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store:
        store.submit("job", SPEC, 0, 1.0)
    (tmp_path / "jobs/job/record.json").write_text("{")
    with pytest.raises(StorageError, match=r"jobs/job/record\.json"):
        JobStore(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="--state-dir"):
        JobStore(tmp_path / "file")


def test_nothing_queued(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store:
        assert store.start_next(1.0) is None
        assert store.get("job") is None

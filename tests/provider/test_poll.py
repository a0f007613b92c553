from __future__ import annotations

import pytest
from airflow.sdk.exceptions import AirflowFailException

from moegen_airflow.exceptions import (
    MoegenInputError,
    MoegenJobCancelledError,
    MoegenJobFailedError,
    MoegenJobNotFoundError,
    MoegenPartialFailureError,
    MoegenQueueTimeoutError,
    MoegenTimeoutError,
    MoegenTriggerEventError,
    MoegenUnavailableError,
)
from moegen_airflow.news import progress_line, progress_value
from moegen_airflow.poll import MAX_FAILURES, JobPoll, manifest_of

END = 1000.0
MANIFEST = {"rows": 3}
DOWN = MoegenUnavailableError("connection refused")


def job(state: str, **fields):
    return {"key": "k", "state": state, "queue_position": 0, "progress": None, "manifest": None, **fields}


@pytest.mark.parametrize("now", [END - 1, END + 1], ids=["before the deadline", "after it"])
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (job("succeeded", manifest=MANIFEST), "succeeded"),
        (job("failed", error="no such column", exit_code=64), "failed"),
        (job("cancelled"), "cancelled"),
        (MoegenJobNotFoundError("HTTP 404"), "missing"),
        (MoegenInputError("HTTP 401"), "refused"),
    ],
)
def test_one_event_per_end(answer, status, now):
    event, _ = JobPoll("k", END).step(answer, now)
    assert event["status"] == status
    assert event["key"] == "k"


@pytest.mark.parametrize("state", ["queued", "running", "a state of a later version"])
def test_waits_until_the_deadline(state):
    poll = JobPoll("k", END)
    assert poll.step(job(state), END - 0.1)[0] is None
    assert poll.step(job(state), END)[0]["status"] == "timeout"


def test_failures_in_a_row_are_forgiven_and_an_answer_forgets_them():
    poll = JobPoll("k", END)
    for _ in range(3):
        assert [poll.step(DOWN, 0)[0] for _ in range(MAX_FAILURES - 1)] == [None] * (MAX_FAILURES - 1)
        assert poll.step(job("running"), 0)[0] is None
    events = [poll.step(DOWN, 0)[0] for _ in range(MAX_FAILURES)]
    assert events[:-1] == [None] * (MAX_FAILURES - 1)
    assert events[-1]["status"] == "unavailable"
    assert "connection refused" in events[-1]["message"]


def test_failures_do_not_outlive_the_deadline():
    assert JobPoll("k", END).step(DOWN, END)[0]["status"] == "timeout"


def test_sleep_ends_at_the_deadline():
    poll = JobPoll("k", END)
    assert poll.delay_s(30, END - 100) == 30
    assert poll.delay_s(30, END - 10) == 10
    assert poll.delay_s(30, END + 10) == 0


def test_the_queue_s_own_deadline():
    poll = JobPoll("k", END, queue_timeout=50)
    assert poll.step(job("queued", queued_at=100.0), 149)[0] is None
    assert poll.delay_s(30, 149) == 1
    assert poll.step(job("queued", queued_at=100.0), 150)[0]["status"] == "queue_timeout"


@pytest.mark.parametrize(
    "answer",
    [job("running", queued_at=100.0), job("queued", queued_at=100.0, started_at=120.0), job("paused", queued_at=100.0)],
    ids=["running", "interrupted after its start", "paused"],
)
def test_a_job_that_has_had_the_device_is_not_late_in_the_queue(answer):
    poll = JobPoll("k", END, queue_timeout=50)
    assert poll.step(answer, 500)[0] is None
    assert poll.delay_s(30, 500) == 30


def test_progress_as_values():
    progress = {"stage": "running", "rows_done": 2, "rows_total": 4, "eta_s": 60.0, "statuses": {"ok": 1, "error": 1}}
    value = progress_value(job("running", progress=progress), now=0)
    assert (value["eta"], value["rows_not_ok"], value["job_key"]) == ("1970-01-01T00:01:00+00:00", 1, "k")
    assert progress_value(job("succeeded", progress=progress), now=0)["eta"] is None
    assert progress_value(job("queued", queue_position=3), now=0)["queue_position"] == 3


def test_a_line_per_change_only():
    poll = JobPoll("k", END)
    running = job("running", progress={"stage": "running", "rows_done": 1, "rows_total": 4, "rows_per_s": 2.0})
    faster = job("running", progress={**running["progress"], "rows_per_s": 3.0})
    further = job("running", progress={**running["progress"], "rows_done": 2})
    answers = [job("queued", queue_position=2), job("queued", queue_position=2), running, faster, further]
    assert [poll.step(answer, 0)[1] for answer in answers] == [
        "queued, position 2",
        None,
        "1/4 rows (25.0 %) · 2.0 rows/s",
        None,
        "2/4 rows (50.0 %) · 2.0 rows/s",
    ]


def test_progress_line_in_full():
    progress = {
        "stage": "running", "rows_done": 1_240_000, "rows_total": 5_000_000, "rows_per_s": 812.04, "eta_s": 4630,
        "statuses": {"ok": 1_239_969, "error": 30, "too_long": 1},
    }  # fmt: skip
    line = progress_line(job("running", progress=progress), now=0)
    assert line == "1 240 000/5 000 000 rows (24.8 %) · 812.0 rows/s · ETA 01:17 UTC · 31 not ok"


def test_progress_line_of_an_ended_job():
    progress = {"rows_done": 1, "rows_total": 4, "eta_s": 7.0, "statuses": {"ok": 1}}
    assert progress_line(job("cancelled", progress=progress), now=0) == "cancelled, 1/4 rows (25.0 %)"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"progress": None}, "running, starting"),
        ({"progress": {"stage": "loading", "rows_done": 0, "rows_total": 0}}, "running, loading"),
    ],
)
def test_progress_line_before_the_first_row(fields, line):
    assert progress_line(job("running", **fields), now=0) == line


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("failed", MoegenJobFailedError),
        ("cancelled", MoegenJobCancelledError),
        ("timeout", MoegenTimeoutError),
        ("queue_timeout", MoegenQueueTimeoutError),
        ("unavailable", MoegenUnavailableError),
        ("missing", MoegenJobNotFoundError),
        ("refused", MoegenInputError),
    ],
)
def test_every_other_end_raises_its_own_error(status, error):
    with pytest.raises(error, match="job k went wrong"):
        manifest_of({"status": status, "key": "k", "message": "job k went wrong"})


def test_a_bad_specification_and_too_many_failed_rows_are_not_retried_but_other_failures_are():
    for final, error in ((2, MoegenPartialFailureError), (64, MoegenInputError)):
        with pytest.raises(error) as caught:
            manifest_of({"status": "failed", "key": "k", "exit_code": final})
        assert isinstance(caught.value, AirflowFailException)
    with pytest.raises(MoegenJobFailedError) as caught:
        manifest_of({"status": "failed", "key": "k", "exit_code": 70})
    assert not isinstance(caught.value, AirflowFailException)


@pytest.mark.parametrize(
    "event",
    [None, "succeeded", [], {}, {"status": 5}, {"status": "paused", "key": "k"}, {"status": "succeeded", "key": "k"},
     {"status": "succeeded", "key": "k", "manifest": "s3://…"}],
)  # fmt: skip
def test_a_malformed_event_is_an_error(event):
    with pytest.raises(MoegenTriggerEventError):
        manifest_of(event)


def test_success_gives_the_manifest():
    assert manifest_of({"status": "succeeded", "key": "k", "manifest": MANIFEST}) == MANIFEST

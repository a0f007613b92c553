from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from fastapi.responses import JSONResponse

from moegen_airflow.exceptions import (
    MoegenInputError,
    MoegenJobCancelledError,
    MoegenJobFailedError,
    MoegenTimeoutError,
    MoegenTriggerEventError,
    MoegenUnavailableError,
)
from moegen_airflow.link import JOB_URL
from moegen_airflow.operator import MoegenBatchOperator
from tests.provider.fake_task import context

MANIFEST = {"rows": 3, "statuses": {"ok": 3}}


def operator(**parameters) -> MoegenBatchOperator:
    defaults = {
        "task_id": "t", "input_uri": "in.parquet", "output_uri": "out", "model_id": "m",
        "sampling_params": {"max_tokens": 8}, "poll_interval": 0.01,
    }  # fmt: skip
    return MoegenBatchOperator(**defaults | parameters)


def only_job(service) -> dict:
    (job,) = service.jobs.values()
    return job


def succeed(job) -> None:
    job.update(state="succeeded", manifest=MANIFEST)


def deferred(task, ctx) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        task.execute(ctx)
    return caught.value


def test_waits_and_returns_the_manifest(fake_service):
    states = iter(["queued", "running", "running"])
    fake_service.on_get = lambda job: job.update(state=state) if (state := next(states, None)) else succeed(job)
    ctx = context()
    assert operator().execute(ctx) == MANIFEST
    assert fake_service.methods() == ["GET", "PUT", "GET", "GET", "GET", "GET"]
    assert ctx["ti"].xcom[JOB_URL] == f"{fake_service.url}/jobs/{only_job(fake_service)['key']}"


def test_deferred_returns_the_same(fake_service):
    task = operator(deferrable=True)
    defer = deferred(task, context())
    assert defer.method_name == "execute_complete"
    assert not defer.kwargs  # dag.test() drops them
    assert defer.timeout > task.timeout
    event = {"status": "succeeded", "key": defer.trigger.key, "manifest": MANIFEST, "owner": 1}
    assert operator(deferrable=True).execute_complete(context(), event) == MANIFEST  # a fresh instance


def test_not_waiting_returns_the_key(fake_service):
    assert operator(wait_for_completion=False).execute(context()) == only_job(fake_service)["key"]
    assert fake_service.methods() == ["GET", "PUT"]


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_job_that_succeeded_before_is_returned_at_once(fake_service, deferrable):
    operator(wait_for_completion=False).execute(context())
    succeed(only_job(fake_service))
    assert operator(deferrable=deferrable).execute(context(try_number=2)) == MANIFEST
    assert len(fake_service.jobs) == 1


@pytest.mark.parametrize("state", ["queued", "running", "failed", "cancelled"])
def test_a_retry_attaches_as_a_newer_owner(fake_service, state):
    first = deferred(operator(deferrable=True), context()).trigger
    only_job(fake_service)["state"] = state
    second = deferred(operator(deferrable=True), context(try_number=2)).trigger
    assert second.key == first.key
    assert (first.owner, second.owner) == (1, 2)
    assert only_job(fake_service)["state"] == ("running" if state == "running" else "queued")


def test_a_failed_job_fails_the_task(fake_service):
    fake_service.on_get = lambda job: job.update(state="failed", error="disk full", exit_code=69)
    with pytest.raises(MoegenJobFailedError, match="disk full") as caught:
        operator().execute(context())
    assert not isinstance(caught.value, AirflowFailException)  # a retry resumes the job


def test_a_refused_specification_is_not_retried(fake_service):
    fake_service.replies = [JSONResponse({}, 404), JSONResponse({"detail": "input.uri: not allowed"}, 422)]
    with pytest.raises(MoegenInputError, match=r"input\.uri: not allowed"):
        operator().execute(context())


@pytest.mark.parametrize("failures", [4, 5])
def test_polls_that_fail(fake_service, failures):
    key = operator(wait_for_completion=False).execute(context())
    fake_service.on_get = succeed
    fake_service.replies = [JSONResponse({"detail": "busy"}, 503)] * failures
    task = operator()
    if failures < 5:
        assert task.execute_complete(context(), task._wait(key, time.time() + 60)) == MANIFEST
    else:
        with pytest.raises(MoegenUnavailableError, match="5 polls failed in a row"):
            task.execute_complete(context(), task._wait(key, time.time() + 60))
        assert "DELETE" not in fake_service.methods()  # left running, a retry attaches


def test_the_timeout_cancels_the_job_in_both_modes(fake_service):
    with pytest.raises(MoegenTimeoutError, match="did not end by"):
        operator(timeout=0.05).execute(context())
    assert only_job(fake_service)["state"] == "cancelled"

    trigger = deferred(operator(deferrable=True), context(try_number=2)).trigger
    event = {"status": "timeout", "key": trigger.key, "message": "late", "owner": trigger.owner}
    with pytest.raises(MoegenTimeoutError, match="late"):
        operator().execute_complete(context(), event)
    assert only_job(fake_service)["state"] == "cancelled"


def test_the_timeout_of_an_older_attempt_leaves_the_job_alone(fake_service):
    old = deferred(operator(deferrable=True), context()).trigger
    deferred(operator(deferrable=True), context(try_number=2))
    with pytest.raises(MoegenTimeoutError):
        operator().execute_complete(context(), {"status": "timeout", "key": old.key, "owner": old.owner})
    assert only_job(fake_service)["state"] == "queued"


@pytest.mark.parametrize("event", [None, {}, {"status": "timeout"}, {"status": "succeeded", "key": "k"}, "succeeded"])
def test_a_malformed_event_fails_the_task(fake_service, event):
    with pytest.raises(MoegenTriggerEventError):
        operator().execute_complete(context(), event)


@pytest.mark.parametrize("cancel_on_kill", [True, False])
def test_a_signal_cancels_the_job_and_ends_the_wait(fake_service, cancel_on_kill):
    task = operator(cancel_on_kill=cancel_on_kill, poll_interval=60)
    previous = signal.signal(signal.SIGTERM, lambda *_: task.on_kill())  # as Airflow's task runner does
    killer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    killer.start()
    try:
        with pytest.raises(MoegenJobCancelledError, match="killed"):
            task.execute(context())
    finally:
        killer.join()
        signal.signal(signal.SIGTERM, previous)
    assert only_job(fake_service)["state"] == ("cancelled" if cancel_on_kill else "queued")


def test_a_kill_by_an_older_attempt_leaves_the_job_alone(fake_service):
    old, new = operator(wait_for_completion=False), operator(wait_for_completion=False)
    old.execute(context())
    new.execute(context(try_number=2))
    old.on_kill()
    assert only_job(fake_service)["state"] == "queued"
    new.on_kill()
    assert only_job(fake_service)["state"] == "cancelled"


def test_a_kill_before_anything_was_submitted_sends_nothing(fake_service):
    operator().on_kill()
    assert fake_service.requests == []


def test_prompt_texts_are_never_templated():
    assert not {"prompt_template", "system_prompt"} & set(MoegenBatchOperator.template_fields)

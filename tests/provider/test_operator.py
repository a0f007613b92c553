from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from fastapi.responses import JSONResponse

from moegen_airflow.exceptions import (
    MoegenInputError,
    MoegenJobCancelledError,
    MoegenJobFailedError,
    MoegenQueueTimeoutError,
    MoegenStaleInputError,
    MoegenTimeoutError,
    MoegenTriggerEventError,
    MoegenUnavailableError,
)
from moegen_airflow.link import JOB_URL
from moegen_airflow.operator import MoegenBatchOperator
from tests.provider.fake_task import StateStore, context

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
    assert fake_service.methods() == ["POST", "GET", "PUT", "GET", "GET", "GET", "GET"]
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
    assert fake_service.methods() == ["POST", "GET", "PUT"]
    (spec,) = fake_service.specs.values()
    assert "lease_hours" not in spec["job"]  # nobody has to look at it


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
    fake_service.replies = [JSONResponse({"detail": "input.uri: no row in in.parquet"}, 422)]
    with pytest.raises(MoegenInputError, match=r"input\.uri: no row"):
        operator().execute(context())
    assert fake_service.methods() == ["POST"]  # nothing was queued


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


@pytest.mark.parametrize(("cancel_on_timeout", "state"), [(True, "cancelled"), (False, "queued")])
def test_the_timeout(fake_service, cancel_on_timeout, state):
    with pytest.raises(MoegenTimeoutError, match="did not end by") as caught:
        operator(timeout=0.05, cancel_on_timeout=cancel_on_timeout).execute(context())
    assert only_job(fake_service)["state"] == state
    assert isinstance(caught.value, AirflowFailException)  # retries share the clock


def test_the_queue_timeout_may_be_retried_and_begins_anew(fake_service):
    for attempt in (1, 2):
        with pytest.raises(MoegenQueueTimeoutError, match=r"waited 0\.05 s in the queue") as caught:
            operator(queue_timeout=0.05).execute(context(try_number=attempt))
        assert only_job(fake_service)["state"] == "cancelled"
        assert not isinstance(caught.value, AirflowFailException)


def test_the_clock_is_kept_over_retries_and_begins_anew_after_a_clear(fake_service):
    store = StateStore()
    ends = [
        deferred(
            operator(deferrable=True, retries=2), context(store, try_number=tries, max_tries=most)
        ).trigger.end_time
        for tries, most in ((1, 2), (2, 2), (3, 5))
    ]
    assert ends[0] == ends[1] < ends[2]
    assert store["moegen_job"]["key"] == only_job(fake_service)["key"]
    assert store["moegen_job"]["owner"] == 3


@pytest.mark.parametrize("parameters", [{}, {"durable": False}], ids=["no store", "not durable"])
def test_without_a_store_the_clock_begins_when_the_job_was_queued(fake_service, parameters):
    first = deferred(operator(deferrable=True, **parameters), context()).trigger
    only_job(fake_service)["queued_at"] -= 100
    again = deferred(operator(deferrable=True, **parameters), context(try_number=2)).trigger
    assert first.end_time - again.end_time == pytest.approx(100, abs=5)


def test_a_store_that_fails_fails_no_task(fake_service):
    class Broken(StateStore):
        def get(self, key, default=None):
            raise RuntimeError("no connection")

        def set(self, key, value, *, retention=None):
            raise RuntimeError("no connection")

    assert operator(wait_for_completion=False).execute(context(Broken())) == only_job(fake_service)["key"]


def test_a_new_attempt_takes_its_job_over_before_anything_that_takes_time(fake_service):
    store = StateStore()
    old = deferred(operator(deferrable=True), context(store)).trigger
    fake_service.requests.clear()
    new = deferred(operator(deferrable=True), context(store, try_number=2)).trigger
    assert fake_service.methods() == ["GET", "PUT", "POST", "GET"]
    assert (new.key, new.owner) == (old.key, 2)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_that_has_ended_is_resumed_only_after_the_preflight(fake_service, state):
    store = StateStore()
    deferred(operator(deferrable=True), context(store))
    only_job(fake_service)["state"] = state
    fake_service.refusal = "input.uri: not found"
    with pytest.raises(MoegenInputError, match="not found"):
        operator().execute(context(store, try_number=2))
    assert only_job(fake_service)["state"] == state


def test_a_job_whose_input_has_gone_is_not_left_running(fake_service):
    store = StateStore()
    deferred(operator(deferrable=True), context(store))
    fake_service.refusal = "input.uri: not found"
    with pytest.raises(MoegenInputError, match="not found"):
        operator().execute(context(store, try_number=2))
    assert only_job(fake_service)["state"] == "cancelled"


def test_another_input_replaces_the_task_s_job(fake_service):
    store = StateStore()
    old = deferred(operator(deferrable=True), context(store)).trigger
    fake_service.input_version = "2"
    fake_service.output = {"output": "other", "output_detail": "out belongs to other work"}
    new = deferred(operator(deferrable=True), context(store, try_number=2)).trigger
    assert new.key != old.key
    assert {key: job["state"] for key, job in fake_service.jobs.items()} == {old.key: "cancelled", new.key: "queued"}
    assert fake_service.specs[new.key]["output"] == {"uri": "out", "mode": "new_run"}
    again = deferred(operator(deferrable=True), context(store, try_number=3)).trigger  # what is there is its own now
    assert (again.key, again.owner) == (new.key, 2)


def test_a_folder_that_the_task_has_not_written_is_never_cleared(fake_service):
    store = StateStore()
    deferred(operator(deferrable=True), context(store))
    fake_service.input_version = "2"
    fake_service.output = {"output": "other", "output_detail": "elsewhere/part-0 belongs to other work"}
    with pytest.raises(MoegenInputError, match="elsewhere"):
        operator(deferrable=True, output_uri="elsewhere").execute(context(store, try_number=2))
    assert len(fake_service.jobs) == 1


def test_a_job_that_another_task_has_taken_over_is_not_cancelled(fake_service):
    """Shards in another order: the second finds the first one's job, before or after the first has moved on."""
    first = StateStore()
    job = deferred(operator(deferrable=True), context(first, map_index=0)).trigger
    deferred(operator(deferrable=True), context(StateStore(), map_index=1))
    fake_service.input_version = "2"
    deferred(operator(deferrable=True), context(first, map_index=0))
    assert fake_service.jobs[job.key]["state"] == "queued"


def test_a_changed_input_may_fail_the_task_instead(fake_service):
    store = StateStore()
    task = operator(deferrable=True, on_stale_input="fail")
    deferred(task, context(store))
    fake_service.input_version = "2"
    with pytest.raises(MoegenStaleInputError, match="force_rerun"):
        task.execute(context(store, try_number=2))
    assert only_job(fake_service)["state"] == "queued"


def test_others_output_is_refused_before_anything_is_queued(fake_service):
    fake_service.output = {"output": "other", "output_detail": "out/part-0 belongs to other work; use another folder"}
    with pytest.raises(MoegenInputError, match="use another folder; nothing was queued"):
        operator().execute(context(StateStore()))
    assert fake_service.jobs == {}


@pytest.mark.parametrize("force", [True, "True", "yes"])
def test_force_rerun_runs_again_once_per_clear(fake_service, force):
    fake_service.on_get = succeed
    operator().execute(context())
    keys = []
    for tries, most in ((1, 0), (2, 0), (3, 2)):  # the second is a retry
        operator(force_rerun=force, wait_for_completion=False).execute(context(try_number=tries, max_tries=most))
        keys.append(list(fake_service.jobs))
    assert [len(known) for known in keys] == [2, 2, 3]
    assert fake_service.specs[keys[-1][-1]]["output"]["mode"] == "new_run"


@pytest.mark.parametrize("parameters", [{"on_stale_input": "ignore"}, {"stream_logs": "all"}, {"force_rerun": "maybe"}])
def test_unknown_words_are_refused(fake_service, parameters):
    with pytest.raises(MoegenInputError, match=next(iter(parameters))):
        operator(**parameters).execute(context())
    assert fake_service.requests == []


@pytest.mark.parametrize(
    ("stream_logs", "shown"), [("progress", [True, False]), ("none", [False, False]), ("full", [True, True])]
)
def test_what_the_log_shows(fake_service, capsys, stream_logs, shown):
    states = iter(["running", "running"])

    def move(job):
        fake_service.log += "layer 3 of 4\n"
        job.update(state=state) if (state := next(states, None)) else succeed(job)

    fake_service.on_get = move
    operator(stream_logs=stream_logs).execute(context())
    log = capsys.readouterr().out
    assert [text in log for text in ("running, starting", "runner: layer 3 of 4")] == shown


def test_progress_is_an_xcom(fake_service):
    progress = {"stage": "running", "rows_done": 1, "rows_total": 4, "rows_per_s": 2.0, "eta_s": 1.5}
    states = iter(["running"])
    fake_service.on_get = lambda job: (
        job.update(state=s, progress=progress) if (s := next(states, None)) else succeed(job)
    )
    ctx = context()
    operator().execute(ctx)
    value = ctx["ti"].xcom["progress"]
    assert (value["state"], value["rows_done"], value["rows_total"], value["rows_per_s"]) == ("succeeded", 1, 4, 2.0)
    json.dumps(value)


def test_the_asset_event_says_what_was_written(fake_service):
    asset = Asset("s3://lake/answers")
    event = {"status": "succeeded", "key": "k", "manifest": MANIFEST | {"completion_tokens": 9, "rows_per_s": 2.5}}
    ctx = context()
    operator(outlets=[asset], output_uri="s3://lake/answers/").execute_complete(ctx, event)
    extra = ctx["outlet_events"][asset].extra
    assert (extra["rows"], extra["completion_tokens"], extra["rows_per_s"], extra["model"]) == (3, 9, 2.5, "m")
    assert extra["manifest_uri"] == "s3://lake/answers/_manifest.json"
    json.dumps(extra)


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

from __future__ import annotations

import pytest
from airflow.sdk.exceptions import AirflowSensorTimeout, AirflowSkipException, TaskDeferred
from fastapi.responses import JSONResponse

from moegen_airflow.exceptions import MoegenJobFailedError, MoegenJobNotFoundError, MoegenTriggerEventError
from moegen_airflow.link import JOB_URL
from moegen_airflow.sensor import MoegenBatchSensor
from tests.provider.fake_task import context

MANIFEST = {"rows": 3}
TIMEOUT = {"status": "timeout", "key": "k", "message": "job k did not end"}


def sensor(**parameters) -> MoegenBatchSensor:
    return MoegenBatchSensor(**{"task_id": "s", "job_key": "k", "poke_interval": 0.01, "timeout": 30} | parameters)


def test_pokes_until_the_manifest(fake_service):
    fake_service.add("k", "queued")
    states = iter(["queued", "running", "succeeded"])
    fake_service.on_get = lambda job: job.update(state=next(states), manifest=MANIFEST)
    ctx = context()
    assert sensor().execute(ctx) == MANIFEST
    assert ctx["ti"].xcom[JOB_URL] == f"{fake_service.url}/jobs/k"


def test_defers_and_completes(fake_service):
    with pytest.raises(TaskDeferred) as caught:
        sensor(deferrable=True).execute(context())
    trigger = caught.value.trigger
    assert (trigger.key, trigger.cancel_on_kill, trigger.poll_interval) == ("k", False, 0.01)
    assert caught.value.timeout > 30
    event = {"status": "succeeded", "key": "k", "manifest": MANIFEST}
    assert sensor(deferrable=True).execute_complete(context(), event) == MANIFEST


def test_a_failed_or_unknown_job_fails_in_both_modes(fake_service):
    with pytest.raises(MoegenJobNotFoundError):
        sensor().execute(context())
    with pytest.raises(MoegenJobNotFoundError):
        sensor().execute_complete(context(), {"status": "missing", "key": "k"})
    fake_service.add("k", "failed", error="disk full")
    with pytest.raises(MoegenJobFailedError, match="disk full"):
        sensor().execute(context())
    with pytest.raises(MoegenJobFailedError, match="disk full"):
        sensor().execute_complete(context(), {"status": "failed", "key": "k", "message": "disk full"})


@pytest.mark.parametrize(("soft_fail", "error"), [(False, AirflowSensorTimeout), (True, AirflowSkipException)])
def test_the_timeout_means_the_same_in_both_modes(fake_service, soft_fail, error):
    fake_service.add("k", "running")
    with pytest.raises(error):
        sensor(timeout=0.05, soft_fail=soft_fail).execute(context())
    with pytest.raises(error):
        sensor(soft_fail=soft_fail).resume_execution("execute_complete", {"event": TIMEOUT}, context())
    assert "DELETE" not in fake_service.methods()


def test_failed_polls_are_forgiven(fake_service):
    fake_service.add("k", "succeeded", manifest=MANIFEST)
    fake_service.replies = [JSONResponse({"detail": "busy"}, 503)] * 4
    assert sensor().execute(context()) == MANIFEST


@pytest.mark.parametrize("event", [None, {}, {"status": "done"}, {"status": "succeeded"}])
def test_a_malformed_event_is_an_error(event):
    with pytest.raises(MoegenTriggerEventError):
        sensor().execute_complete(context(), event)

from __future__ import annotations

import asyncio
import time

import pytest
from airflow.sdk.execution_time.xcom import XCom
from airflow.sdk.module_loading import import_string
from airflow.sdk.serde import deserialize, serialize
from fastapi.responses import JSONResponse

from moegen_airflow.trigger import MoegenBatchTrigger
from tests.provider.fake_task import TaskInstance


def trigger(**parameters) -> MoegenBatchTrigger:
    defaults = {"moegen_conn_id": "moegen_default", "key": "k", "end_time": time.time() + 60, "poll_interval": 0.01}
    return MoegenBatchTrigger(**defaults | parameters)


def fire(one: MoegenBatchTrigger) -> list[dict]:
    async def events():
        return [event.payload async for event in one.run()]

    return asyncio.run(asyncio.wait_for(events(), timeout=20))


def test_round_trip():
    one = trigger(
        owner=7,
        cancel_on_kill=True,
        cancel_on_timeout=True,
        end_time=1790000000.25,
        queue_timeout=9,
        stream_logs="full",
    )
    path, kwargs = one.serialize()
    again = import_string(path)(**deserialize(serialize(kwargs)))
    assert again.serialize() == one.serialize()
    assert "token" not in str(kwargs)


@pytest.mark.parametrize(
    ("state", "fields", "more"),
    [
        ("succeeded", {"manifest": {"rows": 1}}, {"manifest": {"rows": 1}}),
        ("failed", {"error": "disk full", "exit_code": 69}, {"exit_code": 69}),
        ("cancelled", {}, {}),
    ],
)
def test_one_event_per_end(fake_service, state, fields, more):
    fake_service.add("k", state, **fields)
    (event,) = fire(trigger(owner=3))
    assert event.items() >= {"status": state, "key": "k", "owner": 3, **more}.items()


def test_polls_until_the_end(fake_service):
    fake_service.add("k", "queued")
    states = iter(["queued", "running", "running", "succeeded"])
    fake_service.on_get = lambda job: job.update(state=next(states), manifest={})
    assert [event["status"] for event in fire(trigger())] == ["succeeded"]
    assert fake_service.methods() == ["GET"] * 4


def test_an_unknown_job_and_a_wrong_token(fake_service, monkeypatch):
    assert [event["status"] for event in fire(trigger())] == ["missing"]
    monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", fake_service.connection_uri.replace("right", "wrong"))
    assert [event["status"] for event in fire(trigger())] == ["refused"]


@pytest.mark.parametrize(("failures", "status"), [(4, "cancelled"), (5, "unavailable")])
def test_failed_polls(fake_service, failures, status):
    fake_service.add("k", "cancelled")
    fake_service.replies = [JSONResponse({"detail": "busy"}, 503)] * failures
    assert [event["status"] for event in fire(trigger())] == [status]


def test_the_deadline_is_kept_to_however_long_the_interval(fake_service):
    fake_service.add("k", "running")
    began = time.monotonic()
    assert [event["status"] for event in fire(trigger(end_time=time.time() + 0.3, poll_interval=3600))] == ["timeout"]
    assert time.monotonic() - began < 10
    assert fake_service.jobs["k"]["state"] == "running"


@pytest.mark.parametrize(("owner", "state"), [(2, "cancelled"), (1, "queued")], ids=["owner", "superseded"])
@pytest.mark.parametrize("late", [{"end_time": 0.0}, {"queue_timeout": 0.0}], ids=["timeout", "queue timeout"])
def test_at_a_deadline_it_cancels_as_its_owner(fake_service, late, owner, state):
    job = fake_service.add("k", "queued", owner=2)
    (event,) = fire(trigger(owner=owner, cancel_on_timeout=True, **late))
    assert event["status"] == next(iter(late)).replace("end_time", "timeout")
    assert job["state"] == state


def test_the_runner_s_log_and_progress(fake_service, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(XCom, "set", lambda **what: pushed.append(what))
    fake_service.add("k", "queued")
    states = iter(["queued", "running", "succeeded"])

    def move(job):
        fake_service.log += f"{len(fake_service.log)} bytes before\n"
        job.update(state=next(states), manifest={})

    fake_service.on_get = move
    one = trigger(stream_logs="full")
    one._task_instance = TaskInstance(map_index=3)
    fire(one)
    log = capsys.readouterr().out
    assert [what["value"]["state"] for what in pushed] == ["queued", "running", "succeeded"]
    assert {(what["key"], what["task_id"], what["map_index"]) for what in pushed} == {("progress", "t", 3)}
    assert "0 bytes before" not in log  # printed before anybody watched
    assert "runner: 15 bytes before" in log


def test_an_xcom_that_cannot_be_written_ends_nothing(fake_service, monkeypatch, capsys):
    def refuse(**what):
        raise RuntimeError("no connection")

    monkeypatch.setattr(XCom, "set", refuse)
    fake_service.add("k", "succeeded", manifest={})
    one = trigger()
    one._task_instance = TaskInstance()
    assert [event["status"] for event in fire(one)] == ["succeeded"]
    assert "no connection" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "cancel_on_kill", "state"),
    [(2, True, "cancelled"), (1, True, "running"), (2, False, "running")],
    ids=["owner", "superseded", "not asked to"],
)
def test_on_kill(fake_service, owner, cancel_on_kill, state):
    job = fake_service.add("k", "running", owner=2)
    asyncio.run(trigger(owner=owner, cancel_on_kill=cancel_on_kill).on_kill())
    assert job["state"] == state


def test_a_restart_of_the_triggerer_cancels_nothing(fake_service):
    job = fake_service.add("k", "running", owner=1)

    async def stopped_and_started_again():
        one = trigger(owner=1, cancel_on_kill=True)
        run = asyncio.create_task(anext(one.run()))
        await asyncio.sleep(0.2)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await one.cleanup()

    asyncio.run(stopped_and_started_again())
    assert job["state"] == "running"
    job["state"] = "succeeded"
    assert [event["status"] for event in fire(trigger(owner=1))] == ["succeeded"]

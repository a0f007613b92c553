"""The provider on a running Airflow, with the real job service."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from tests.provider.real_service import wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]


def only_new(service, known: set[str]) -> dict:
    """The one job that is not among `known`."""
    (job,) = [job for job in service.jobs() if job["key"] not in known]
    return job


def keys(service) -> set[str]:
    return {job["key"] for job in service.jobs()}


def rows_of(folder: str) -> list[int]:
    return pq.read_table(folder).column("row_index").to_pylist()


def test_the_example_with_the_sensor(airflow, service, stage):
    known = keys(service)
    conf = stage.conf(stage.table("example", 30), "example")
    run_id = airflow.run("moegen_table", **conf, max_tokens=8)
    job = only_new(service, known)
    assert airflow.xcom("moegen_table", run_id, "submit") == job["key"]
    assert airflow.xcom("moegen_table", run_id, "wait") == job["manifest"]
    assert sum(airflow.xcom("moegen_table", run_id, "check_rows").values()) == 30
    assert rows_of(conf["output_uri"]) == list(range(30))


def test_both_modes_give_the_same(airflow, service, stage):
    known = keys(service)
    conf = stage.conf(stage.table("modes", 20), "modes")
    run_id = airflow.run("e2e_modes", **conf)
    manifests = [airflow.xcom("e2e_modes", run_id, task) for task in ("waits", "defers", "watched")]
    assert len(keys(service) - known) == 2
    assert manifests[1] == manifests[2]
    for manifest in manifests:
        assert manifest["rows"] == sum(manifest["statuses"].values()) == 20
    tables = [pq.read_table(f"{conf['output_uri']}/{task}") for task in ("waits", "defers")]
    assert tables[0].equals(tables[1])
    link = airflow.get(f"/dags/e2e_modes/dagRuns/{run_id}/taskInstances/defers/links")["extra_links"]["moegen job"]
    assert link == f"{service.url}/jobs/{manifests[1]['job_key']}"
    assert "rows" in airflow.logs("e2e_modes", run_id, "defers")


def test_a_retry_does_not_submit_a_second_job(airflow, service, stage):
    known = keys(service)
    conf = stage.conf(stage.table("retry", 20), "retry")
    run_id = airflow.run("e2e_retry", **conf)
    assert airflow.task("e2e_retry", run_id, "dies_once")["try_number"] == 2
    job = only_new(service, known)
    assert (job["state"], job["attempts"], job["owner"]) == ("succeeded", 1, 2)
    assert job["manifest"]["resumed_rows"] == 0
    assert rows_of(f"{conf['output_uri']}/dies_once") == list(range(20))
    assert airflow.xcom("e2e_retry", run_id, "dies_once") == job["manifest"]


def long_run(airflow, service, stage, mode: str) -> tuple[str, str]:
    """A Dag run whose job runs for minutes; its run id and the job's key."""
    known = keys(service)
    conf = stage.conf(stage.table(f"long_{mode}", 20_000), f"long_{mode}")
    run_id = airflow.trigger(f"e2e_{mode}", **conf)
    wait_until(lambda: keys(service) - known, "the job is submitted", 180)
    key = only_new(service, known)["key"]
    state = {"waiting": "running", "deferred": "deferred"}[mode]
    wait_until(lambda: airflow.task(f"e2e_{mode}", run_id, "long")["state"] == state, f"the task is {state}", 180)
    wait_until(lambda: service.job(key)["state"] == "running", "the job runs", 180)
    return run_id, key


def cancelled(service, key: str) -> bool:
    return service.job(key)["state"] == "cancelled"


def test_killing_a_waiting_task_cancels_the_job(airflow, service, stage):
    run_id, key = long_run(airflow, service, stage, "waiting")
    airflow.mark_failed("e2e_waiting", run_id, "long")
    wait_until(lambda: cancelled(service, key), "the job is cancelled", 180)


def test_clearing_a_deferred_task_keeps_its_job_and_killing_it_cancels(airflow, service, stage):
    run_id, key = long_run(airflow, service, stage, "deferred")
    airflow.clear("e2e_deferred", run_id, "long")
    wait_until(lambda: service.job(key)["owner"] == 2, "the new attempt has taken the job over", 180)
    wait_until(lambda: "on_kill" in airflow.logs("e2e_deferred", run_id, "long", 1), "the old trigger was killed", 180)
    # Airflow calls on_kill only of triggers that have begun: wait for this one's first line.
    wait_until(lambda: "rows (" in airflow.logs("e2e_deferred", run_id, "long", 2), "the new trigger polls", 180)
    wait_until(lambda: service.job(key)["state"] == "running", "the job runs", 180)

    airflow.mark_failed("e2e_deferred", run_id, "long")
    wait_until(lambda: cancelled(service, key), "the job is cancelled", 180)
    assert not (stage.folder / "out" / "long_deferred" / "long" / "_SUCCESS").exists()

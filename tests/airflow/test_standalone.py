"""The provider on a running Airflow, with the real job service."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

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

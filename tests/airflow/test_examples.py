"""The example Dags, and both ways to wait, on a running Airflow with real job services.

All Dag runs begin at once; each test looks at one of them when it has ended. `MOEGEN_NIGHTS=full` runs them, by hand:
CI has not got the minutes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.airflow.nights import FULL
from tests.provider.real_service import RealService, wait_until

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not FULL, reason="minutes long: MOEGEN_NIGHTS=full runs it"),
]

SHARDS = 12
ROWS = 20


@dataclass(frozen=True)
class Run:
    """A Dag run that has begun."""

    airflow: object
    dag_id: str
    run_id: str
    output: str

    def end(self) -> None:
        self.airflow.end(self.dag_id, self.run_id)

    def xcom(self, task_id: str, key: str = "return_value"):
        return self.airflow.xcom(self.dag_id, self.run_id, task_id, key)

    def task(self, task_id: str) -> dict:
        return self.airflow.task(self.dag_id, self.run_id, task_id)


@pytest.fixture(scope="module")
def other_engine(tmp_path_factory, airflow):
    with RealService(tmp_path_factory.mktemp("other_engine")) as service:
        airflow.connect("other_engine", service.port)
        yield service


@pytest.fixture(scope="module")
def runs(airflow, other_engine, stage) -> dict[str, Run]:
    """One of every Dag."""
    shards = [stage.table(f"shard_{number}", number + 5) for number in range(SHARDS)]
    engines = ("moegen_default", "other_engine")
    pairs = [
        {"input_uri": table, "output_uri": f"{stage.folder}/out/shards/{number}", "moegen_conn_id": engines[number % 2]}
        for number, table in enumerate(shards)
    ]
    (stage.folder / "shards.json").write_text(json.dumps(pairs))
    more = {
        "example_shards": {"shards": str(stage.folder / "shards.json")},
        "moegen_approval": {"sample_rows": 7},
        "moegen_arrival": {},
        "moegen_submit": {},
        "example_modes": {},
        "moegen_table": {"max_tokens": 8},
    }
    begun = {}
    for dag_id, own in more.items():
        conf = stage.conf(stage.table(dag_id, ROWS), dag_id)
        begun[dag_id] = Run(airflow, dag_id, airflow.trigger(dag_id, **conf | own), conf["output_uri"])
    return begun


def follower(airflow, dag_id: str) -> Run:
    """The one run of a Dag that nobody triggers by hand, at its end."""
    runs = wait_until(lambda: airflow.get(f"/dags/{dag_id}/dagRuns")["dag_runs"], f"{dag_id} starts by itself", 300, 1)
    run = Run(airflow, dag_id, runs[0]["dag_run_id"], "")
    run.end()
    return run


def rows_of(folder: str) -> list[int]:
    return pq.read_table(folder).column("row_index").to_pylist()


def test_the_sensor_waits_for_the_submitted_job(runs, service):
    run = runs["moegen_table"]
    run.end()
    manifest = service.job(run.xcom("submit"))["manifest"]
    assert run.xcom("wait") == manifest
    assert sum(run.xcom("check_rows").values()) == ROWS
    assert rows_of(run.output) == list(range(ROWS))


def test_both_modes_give_the_same(runs, service):
    run = runs["example_modes"]
    run.end()
    manifests = [run.xcom(task) for task in ("waits", "defers", "watched")]
    assert manifests[0]["job_key"] != manifests[1]["job_key"]
    assert manifests[1] == manifests[2]
    for manifest in manifests:
        assert manifest["rows"] == sum(manifest["statuses"].values()) == ROWS
    tables = [pq.read_table(f"{run.output}/{task}") for task in ("waits", "defers")]
    assert tables[0].equals(tables[1])
    path = f"/dags/example_modes/dagRuns/{run.run_id}/taskInstances/defers/links"
    link = run.airflow.get(path)["extra_links"]["moegen job"]
    assert link == f"{service.url}/jobs/{manifests[1]['job_key']}"


def test_an_asset_starts_the_job_and_its_event_the_check(airflow, runs):
    nightly, check = follower(airflow, "moegen_nightly"), follower(airflow, "moegen_check")
    manifest, said = nightly.xcom("answer"), check.xcom("check")
    assert manifest["rows"] == said["rows"] == ROWS
    for name in ("job_key", "statuses", "prompt_tokens", "completion_tokens"):
        assert said[name] == manifest[name]
    assert said["output_uri"] == runs["moegen_arrival"].output
    assert json.loads(Path(said["manifest_uri"]).read_text())["job_key"] == said["job_key"]
    assert rows_of(said["output_uri"]) == list(range(ROWS))


def test_a_sample_an_approval_and_all(airflow, runs):
    run = runs["moegen_approval"]
    wait_until(lambda: run.task("approve")["state"] == "awaiting_input", "the approval waits", 300, 1)
    assert rows_of(f"{run.output}/sample") == list(range(7))
    assert run.task("everything")["state"] is None
    airflow.approve(run.dag_id, run.run_id, "approve")
    run.end()
    assert rows_of(f"{run.output}/all") == list(range(ROWS))


def test_a_job_of_another_dag(airflow, runs):
    runs["moegen_submit"].end()
    watch = follower(airflow, "moegen_watch")
    manifest = watch.xcom("wait")
    assert manifest["job_key"] == runs["moegen_submit"].xcom("submit")
    assert manifest["rows"] == ROWS


def test_shards_in_another_order_recompute_nothing(airflow, runs, stage, service, other_engine):
    run = runs["example_shards"]
    run.end()

    def jobs() -> dict[str, dict]:
        here = [service.jobs(), other_engine.jobs()]
        return {job["key"]: job for jobs in here for job in jobs if job["name"] == "example_shards.answer"}

    first = jobs()
    listed = json.loads((stage.folder / "shards.json").read_text())
    again = listed[1:] + listed[:1]
    (stage.folder / "shards.json").write_text(json.dumps(again))
    airflow.clear_run(run.dag_id, run.run_id)
    run.end()
    second = jobs()
    assert len(first) == SHARDS
    assert second.keys() == first.keys()
    assert all(job["attempts"] == 1 and job["state"] == "succeeded" for job in second.values())
    assert all(job["owner"] == 2 and job["manifest"] == first[key]["manifest"] for key, job in second.items())
    for number in range(SHARDS):
        assert rows_of(f"{stage.folder}/out/shards/{number}") == list(range(number + 5))

"""The example Dags: loaded as Airflow loads them, and run by `airflow dags test` against the real job service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from airflow.dag_processing.dagbag import DagBag

DAGS = Path(__file__).parents[2] / "dags"
AIRFLOW = str(Path(sys.executable).parent / "airflow")
DAY = "2026-01-01"  # `dags test` of the same day again is the same run again


def test_the_dags_load():
    bag = DagBag(str(DAGS))
    assert bag.import_errors == {}
    assert set(bag.dags) == {"moegen_table", "moegen_shards"}
    assert [task.task_id for task in bag.dags["moegen_table"].topological_sort()] == ["submit", "wait", "check_rows"]
    assert bag.dags["moegen_shards"].get_task("answer").is_mapped


@pytest.fixture(scope="module")
def airflow(tmp_path_factory, real_service):
    """Runs one `airflow` command in a home of its own; its output."""
    home = tmp_path_factory.mktemp("airflow_home")
    settings = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MOEGEN_DEFAULT": real_service.connection_uri,
        "PYTHONWARNINGS": "ignore",
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [AIRFLOW, *arguments], env=os.environ | settings, timeout=240, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    run("db", "migrate")
    return run


def write_table(path: Path, rows: int) -> str:
    pq.write_table(pa.table({"text": [f"ticket {i} of {path.stem}" for i in range(rows)]}), path)
    return str(path)


def conf(**parameters) -> tuple[str, str]:
    return "--conf", json.dumps(parameters | {"max_tokens": 4})


def test_one_table(airflow, real_service, checkpoint, tmp_path):
    table = write_table(tmp_path / "table.parquet", 12)
    known = len(real_service.jobs())
    output = tmp_path / "out"
    arguments = conf(input_uri=table, model_uri=str(checkpoint), output_uri=str(output))
    log = airflow("dags", "test", "moegen_table", DAY, *arguments)
    assert "12 rows in, 12 rows out" in log
    assert pq.read_table(output).column("row_index").to_pylist() == list(range(12))
    assert [job["state"] for job in real_service.jobs()[known:]] == ["succeeded"]


def test_shards_in_another_order_recompute_nothing(airflow, real_service, checkpoint, tmp_path):
    tables = [write_table(tmp_path / f"shard-{name}.parquet", rows) for name, rows in (("a", 5), ("b", 7), ("c", 3))]
    known = len(real_service.jobs())
    for order in (tables, tables[::-1]):
        uris = {"model_uri": str(checkpoint), "output_uri": str(tmp_path / "out")}
        airflow("dags", "test", "moegen_shards", DAY, *conf(input_uris=order, **uris))
        jobs = real_service.jobs()[known:]
        assert [(job["state"], job["attempts"]) for job in jobs] == [("succeeded", 1)] * 3
        parts = {part.parent.name: pq.read_metadata(part).num_rows for part in tmp_path.glob("out/*/part-*.parquet")}
        assert parts == {"shard-a": 5, "shard-b": 7, "shard-c": 3}
    assert [job["owner"] for job in jobs] == [2, 2, 2]  # the second run did attach

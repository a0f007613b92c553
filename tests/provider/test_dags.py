"""The example Dags: loaded as Airflow loads them, and run by `dag.test()` against the real job service."""

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

HERE = Path(__file__).parent
DAGS = HERE.parents[1] / "dags"
SHARDS = {"shard-a": 5, "shard-b": 7}  # rows


def test_the_dags_load():
    bag = DagBag(str(DAGS))
    assert bag.import_errors == {}
    table = (DAGS / "README.md").read_text()
    assert all(f"`{dag_id}`" in table for dag_id in bag.dags)
    assert {path.stem for path in DAGS.glob("*.py")} == {Path(dag.fileloc).stem for dag in bag.dags.values()}
    assert [task.task_id for task in bag.dags["moegen_table"].topological_sort()] == ["submit", "wait", "check_rows"]
    assert bag.dags["moegen_shards"].get_task("answer").is_mapped


def write_table(path: Path, rows: int) -> str:
    pq.write_table(pa.table({"text": [f"ticket {i} of {path.stem}" for i in range(rows)]}), path)
    return str(path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, real_service, checkpoint) -> tuple[Path, list[dict], str]:
    """One table, then two shards twice, the second time in reverse: output folder, new jobs, Airflow's output."""
    folder = tmp_path_factory.mktemp("dags")
    shards = [write_table(folder / f"{name}.parquet", rows) for name, rows in SHARDS.items()]
    table = write_table(folder / "table.parquet", 12)
    common = {"model_uri": str(checkpoint), "max_tokens": 4}
    runs = [("moegen_table", common | {"input_uri": table, "output_uri": str(folder / "table")})]
    for order in (shards, shards[::-1]):
        runs.append(("moegen_shards", common | {"input_uris": order, "output_uri": str(folder)}))
    settings = {
        "AIRFLOW_HOME": str(folder / "airflow_home"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MOEGEN_DEFAULT": real_service.connection_uri,
    }
    known = len(real_service.jobs())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "run_dags.py"), str(DAGS), json.dumps(runs)],
        env=os.environ | settings, timeout=400, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, real_service.jobs()[known:], done.stdout


def rows_of(folder: Path) -> list[int]:
    return pq.read_table(folder).column("row_index").to_pylist()


def test_one_table(ran):
    folder, jobs, log = ran
    assert "12 rows in, 12 rows out" in log
    assert rows_of(folder / "table") == list(range(12))
    assert (jobs[0]["state"], jobs[0]["attempts"], jobs[0]["owner"]) == ("succeeded", 1, 1)


def test_shards_in_another_order_recompute_nothing(ran):
    folder, jobs, _ = ran
    assert {name: len(rows_of(folder / name)) for name in SHARDS} == SHARDS
    assert [(job["state"], job["attempts"]) for job in jobs[1:]] == [("succeeded", 1)] * 2
    assert [job["owner"] for job in jobs[1:]] == [2, 2]  # the second time did attach

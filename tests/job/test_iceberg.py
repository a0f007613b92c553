"""Finished parts in an Iceberg table of a local catalog: whole jobs, run again, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.errors import SpecError, StorageError
from moegen.job.worker import run_job
from moegen.spec import JobSpec

from tests.tiny import tiny_checkpoint

pytest.importorskip("pyiceberg", reason="pyiceberg is not installed (moegen[iceberg])")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from pyiceberg.catalog import load_catalog

    configure(monkeypatch, tmp_path)
    return load_catalog("lake")


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As in the environment of a runner, which pyiceberg reads when it is imported."""
    from pyiceberg.utils.config import Config

    where = {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/warehouse"}
    for name, value in where.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__{name.upper()}", value)
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", Config())


def job(folder: Path, model: Path, day: int = 1, **output: Any) -> JobSpec:
    table = folder / f"in{day}.parquet"
    if not table.exists():
        pq.write_table(pa.table({"id": range(day * 10, day * 10 + 5), "prompt": ["a", "b", None, "d", "e"]}), table)
    return JobSpec.from_mapping(
        {
            "input": {"uri": str(table)},
            "prompt": {"column": "prompt"},
            "model": {"uri": str(model)},
            "sampling": {"max_tokens": 2},
            "output": {
                "uri": str(folder / f"out{day}"), "rows_per_part": 2,
                "iceberg": {"catalog": "lake", "table": "night.answers"}, **output,
            },
        }
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parts_are_registered_once_however_often_the_job_runs(tmp_path: Path, model: Path, catalog: Any) -> None:
    first = run_job(job(tmp_path, model))
    table = catalog.load_table("night.answers")
    assert table.scan().to_arrow()["id"].to_pylist() == list(range(10, 15))
    assert table.current_snapshot().summary["moegen.fingerprint"] == first.fingerprint

    (tmp_path / "out1" / "_SUCCESS").unlink()
    run_job(job(tmp_path, model))  # as a cleared task would
    run_job(job(tmp_path, model, day=2))
    table = catalog.load_table("night.answers")
    rows = table.scan().to_arrow()
    assert sorted(rows["id"].to_pylist()) == [*range(10, 15), *range(20, 25)]
    assert len(table.snapshots()) == 2
    status = dict(zip(rows["id"].to_pylist(), rows["status"].to_pylist(), strict=True))
    assert (status[12], status[22]) == ("skipped_null", "skipped_null")
    part = next((tmp_path / "out1").glob("part-000000*"))
    assert f"file://{part}" in {task.file.file_path for task in table.scan().plan_files()}

    with pytest.raises(SpecError, match="new_run would remove files"):
        run_job(job(tmp_path, model, mode="new_run"))
    assert part.exists()


def test_a_table_that_lacks_a_column_is_told_before_the_model_loads(tmp_path: Path, model: Path, catalog: Any) -> None:
    catalog.create_namespace("night")
    catalog.create_table("night.answers", pa.schema([("id", pa.int64())]))
    with pytest.raises(SpecError, match="has no column"):
        run_job(job(tmp_path, model))
    assert not (tmp_path / "out1").exists()


def test_a_catalog_that_nobody_configured(tmp_path: Path, model: Path) -> None:
    with pytest.raises(SpecError, match=r"output\.iceberg\.catalog: 'nowhere' cannot be used"):
        run_job(job(tmp_path, model, iceberg={"catalog": "nowhere", "table": "a.b"}))


def test_a_catalog_that_is_out_of_reach_leaves_the_parts_and_no_success(
    tmp_path: Path, model: Path, catalog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, Path("/nowhere"))
    with pytest.raises((SpecError, StorageError), match=r"output\.iceberg"):
        run_job(job(tmp_path, model))
    assert not (tmp_path / "out1" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"format": "arrow"}, "format parquet"),
        ({"partition_by": "id"}, "without partition_by"),
        ({"iceberg": {"table": "answers"}}, "namespace and name"),
        ({"iceberg": {"tabel": "a.b"}}, "did you mean 'table'"),
    ],
)
def test_what_cannot_be_registered(tmp_path: Path, model: Path, output: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(tmp_path, model, **output)

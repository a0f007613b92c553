from __future__ import annotations

import sys

import pytest

from moegen_airflow.lineage import dataset_name, facets_on_complete, input_places
from moegen_airflow.operator import MoegenBatchOperator
from tests.provider.fake_task import context


def manifest(files: int = 2) -> dict:
    return {
        "rows": 7,
        "parts": [{"size_bytes": 10}, {"size_bytes": 5}],
        "input_files": [{"uri": f"s3://lake/tickets/ds={i % 2}/{i}.parquet"} for i in range(files)],
    }


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://lake/a/b.parquet", ("s3://lake", "a/b.parquet")),
        ("s3://lake", ("s3://lake", "/")),
        ("gs://lake/a/", ("gs://lake", "a")),
        ("file:///data/a/", ("file", "/data/a")),
        ("/data/a", ("file", "/data/a")),
    ],
)
def test_names_are_openlineages(uri, name):
    assert dataset_name(uri) == name


def test_many_files_are_named_by_their_folders():
    assert len(input_places(manifest(16))) == 16
    assert input_places(manifest(17)) == ["s3://lake/tickets/ds=0", "s3://lake/tickets/ds=1"]


def test_what_a_finished_task_tells():
    pytest.importorskip("airflow.providers.openlineage", reason="apache-airflow-providers-openlineage is not installed")
    task = MoegenBatchOperator(
        task_id="t", input_uri="i", output_uri="s3://lake/out/", model_id="m", sampling_params={}
    )
    assert task.get_openlineage_facets_on_complete(None) is None  # nothing has run
    task.execute_complete(context(), {"status": "succeeded", "key": "k", "manifest": manifest()})
    told = task.get_openlineage_facets_on_complete(None)
    assert [(data.namespace, data.name) for data in told.inputs] == [
        ("s3://lake", "tickets/ds=0/0.parquet"),
        ("s3://lake", "tickets/ds=1/1.parquet"),
    ]
    (written,) = told.outputs
    statistics = written.outputFacets["outputStatistics"]
    assert (written.name, statistics.rowCount, statistics.size, statistics.fileCount) == ("out", 7, 15, 2)


def test_it_never_fails_a_task(monkeypatch):
    assert facets_on_complete({"rows": 1}, "out") is None  # no parts: not one of ours
    monkeypatch.setitem(sys.modules, "airflow.providers.openlineage.extractors", None)
    assert facets_on_complete(manifest(), "out") is None

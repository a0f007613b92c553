"""A real S3 server for all of these tests, a bucket for each, and a job that can be run on them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen import storage
from moegen.spec import JobSpec
from moegen.storage import join, list_names, open_input, put_replace

from tests.s3.ceph import Ceph, missing
from tests.s3.fault_proxy import FaultProxy
from tests.tiny import tiny_checkpoint

ROWS = 120


@dataclass(frozen=True)
class Store:
    """A bucket, and through which endpoint this process and its children reach it."""

    ceph: Ceph
    bucket: str  # its URI
    reach: Callable[[str], None]  # from now on through this endpoint


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    if (why := missing()) is not None:
        pytest.skip(why)
    with Ceph() as server:
        yield server


@pytest.fixture
def store(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import boto3
    import s3fs

    def reach(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()  # instances remember the endpoint of their first use

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ceph.keys.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ceph.keys.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage, "_IGNORE_CONDITIONS", set())
    reach(ceph.endpoint)
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.Session().client("s3").create_bucket(Bucket=name)  # the default session keeps its first credentials
    yield Store(ceph, f"s3://{name}", reach)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def behind(store: Store) -> Iterator[Callable[..., FaultProxy]]:
    """Puts a proxy before the server, for this test."""
    proxies: list[FaultProxy] = []

    def put(**arguments: Any) -> FaultProxy:
        proxies.append(FaultProxy(store.ceph.endpoint, **arguments).__enter__())
        store.reach(proxies[-1].endpoint)
        return proxies[-1]

    yield put
    store.reach(store.ceph.endpoint)  # connections end before the proxy does
    for proxy in proxies:
        proxy.__exit__()


@dataclass(frozen=True)
class Work:
    """A model, a table of `ROWS` rows, and the table that an undisturbed local run makes of it."""

    folder: Path
    expected: pa.Table

    def spec(self, root: str, **sections: dict[str, Any]) -> JobSpec:
        """Of a job whose input and output lie below `root`."""
        put_replace(join(root, "in.jsonl"), (self.folder / "in.jsonl").read_bytes())
        return self._spec(root, sections)

    def _spec(self, root: str, sections: dict[str, dict[str, Any]]) -> JobSpec:
        values: dict[str, dict[str, Any]] = {
            "input": {"uri": join(root, "in.jsonl")},
            "prompt": {"column": "prompt"},
            "model": {"uri": str(self.folder / "model")},
            "sampling": {"max_tokens": 8, "temperature": 1.0, "seed": 7},
            "output": {"uri": join(root, "out"), "rows_per_part": 16, "on_length": "keep"},
            "engine": {"plan": {"kv_pages": 12, "page_tokens": 16}},
            "checkpoint": {"journal_seconds": 0.05},
        }
        return JobSpec.from_mapping({name: {**values.get(name, {}), **sections.get(name, {})} for name in values})


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    from moegen.job.worker import run_job

    folder = tmp_path_factory.mktemp("work")
    tiny_checkpoint(folder / "model")
    lines = [json.dumps({"id": row, "prompt": f"Question {row}: {'why ' * (row % 7)}"}) for row in range(ROWS)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    work = Work(folder, pa.table({}))
    run_job(work._spec(str(folder), {}))
    return Work(folder, table(str(folder / "out")))


def table(output: str) -> pa.Table:
    """The finished table, without the column that says where its input lay."""
    names = list_names(output)
    assert "_SUCCESS" in names
    parts = []
    for name in filter(lambda name: name.startswith("part-"), names):
        with open_input(join(output, name), "random") as file:
            parts.append(pq.read_table(file))
    return pa.concat_tables(parts).drop_columns(["input_file"])

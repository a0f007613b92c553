"""The table room against an S3 server over HTTP."""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moegen.errors import InputError, StorageError
from moegen.spec import Input, Output
from moegen.storage import describe, list_names, put_create, put_replace, read_bytes, remove
from moegen.table.inspect import inspect_output
from moegen.table.reader import TableReader
from moegen.table.writer import TableWriter
from moto.server import ThreadedMotoServer
from table_job import FINGERPRINT, answers, prompts, read_all, run, values


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # instances remember the endpoint of their first use
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


def upload(path: Path, uri: str) -> str:
    put_replace(uri, path.read_bytes())
    return uri


def test_verbs(bucket: str) -> None:
    uri = f"{bucket}/folder/object"
    assert put_create(uri, b"one")
    assert not put_create(uri, b"two")
    first = describe(uri)
    assert (read_bytes(uri), first.size_bytes, len(first.version)) == (b"one", 3, 32)
    put_replace(uri, b"two")
    assert (read_bytes(uri), describe(uri).version == first.version) == (b"two", False)
    assert list_names(f"{bucket}/folder") == ["object"]
    remove(uri)
    remove(uri)
    assert list_names(f"{bucket}/folder") == []


def test_create_only_is_one_put_however_large(bucket: str) -> None:
    uri, data = f"{bucket}/large", bytes(120_000_000)  # s3fs alone would use a multipart upload
    assert put_create(uri, data)
    assert "-" not in describe(uri).version  # which a multipart ETag has
    assert not put_create(uri, data)


def test_of_many_writers_at_once_one_wins(bucket: str) -> None:
    uri, start = f"{bucket}/part", Barrier(4)

    def write(writer: int) -> bool:
        start.wait()
        return put_create(uri, bytes([writer]))

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert won.count(True) == 1
    assert read_bytes(uri) == bytes([won.index(True)])


@pytest.mark.parametrize("format_", ["parquet", "arrow"])
def test_a_job_from_s3_to_s3_is_interrupted_and_resumed(bucket: str, tmp_path: Path, format_: str) -> None:
    upload(prompts(tmp_path, 300), f"{bucket}/in/a.parquet")
    put_replace(f"{bucket}/in/b.jsonl", b'{"prompt": "b", "id": 300}\n{broken\n')
    put_replace(f"{bucket}/in/_SUCCESS", b"")
    input_, output = Input(f"{bucket}/in/"), Output(f"{bucket}/out/", format_, rows_per_part=100)
    reader = TableReader(input_, ["prompt"])
    assert [(file.uri, file.rows) for file in reader.files] == [
        (f"{bucket}/in/a.parquet", 300),
        (f"{bucket}/in/b.jsonl", 2),
    ]
    writer = TableWriter(output, reader.schema, reader.rows, FINGERPRINT, "key")
    for result in answers(reader, writer)[:250]:
        writer.add(result)
    manifest = run(input_, output)
    assert (manifest.rows, manifest.resumed_rows, manifest.statuses) == (302, 200, {"error": 1, "ok": 301})
    found = inspect_output(f"{bucket}/out")
    assert found.success
    assert (found.manifest, found.parts) == (manifest, 4)
    assert list(found.errors) == ["malformed_json"]
    assert run(input_, Output(f"{bucket}/out", format_, rows_per_part=100, mode="new_run")).resumed_rows == 0


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl.gz", "t.arrow", "*.csv"])
def test_every_format_and_a_glob(bucket: str, tmp_path: Path, name: str) -> None:
    path = tmp_path / name.replace("*", "t")
    if name == "t.arrow":
        table = pa.table({"prompt": ["a", "b"]})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif name == "t.jsonl.gz":
        path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    else:
        path.write_text("prompt\na\nb\n")
    upload(path, f"{bucket}/{path.name}")
    assert values(read_all(f"{bucket}/{name}", ["prompt"])) == [{"prompt": "a"}, {"prompt": "b"}]


def test_only_the_projected_columns_are_fetched(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [row.tobytes() for row in np.random.default_rng(0).integers(0, 256, (2000, 10_000), dtype=np.uint8)]
    pq.write_table(pa.table({"noise": noise, "prompt": ["short"] * 2000, "more": noise}), tmp_path / "t.parquet")
    upload(tmp_path / "t.parquet", f"{bucket}/t.parquet")
    fetched: list[int] = []
    fetch = s3fs.S3File._fetch_range
    monkeypatch.setattr(
        s3fs.S3File, "_fetch_range", lambda file, start, end: fetched.append(end - start) or fetch(file, start, end)
    )
    assert len(values(read_all(f"{bucket}/t.parquet", ["prompt"], columns=()))) == 2000
    assert (tmp_path / "t.parquet").stat().st_size > 40_000_000
    assert 0 < sum(fetched) < 1_000_000


def test_what_is_missing_and_what_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t\.parquet: not found"):
        read_all(f"{bucket}/t.parquet")
    with pytest.raises(StorageError, match="cannot be written: no such bucket or folder; create it"):
        TableWriter(Output(f"{bucket}x/out"), pa.schema([]), 1, FINGERPRINT, "key")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"t\.parquet: .*credentials"):
        read_all(f"{bucket}/t.parquet")

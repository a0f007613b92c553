"""The table room against an S3 server over HTTP."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moegen import storage
from moegen.errors import InputError, Interrupted, StorageError
from moegen.row import RowResult, Status
from moegen.spec import Input, Output
from moegen.storage import describe, list_names, put_create, put_replace, read_bytes, remove
from moegen.table.inspect import inspect_output
from moegen.table.journal import Journal
from moegen.table.lease import Lease
from moegen.table.reader import TableReader
from moegen.table.writer import TableWriter
from table_job import FINGERPRINT, answers, prompts, read_all, run, values


class _Unconditional(BaseHTTPRequestHandler):
    """Passes requests on without the header that makes a PUT create-only, as endpoints do that do not know it."""

    protocol_version = "HTTP/1.1"
    behind: str  # host:port

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "if-none-match"}
        with closing(http.client.HTTPConnection(self.behind)) as server:
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def unconditional(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The bucket, through an endpoint that ignores create-only."""
    handler = type("Handler", (_Unconditional,), {"behind": endpoint.removeprefix("http://")})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(storage, "_IGNORE_CONDITIONS", set())
        s3fs.S3FileSystem.clear_instance_cache()
        yield bucket
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


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
    assert put_create(uri, data)  # as if the request had been sent again
    assert not put_create(uri, data[1:])


def test_of_many_writers_at_once_one_wins(bucket: str) -> None:
    uri, start = f"{bucket}/part", Barrier(4)

    def write(writer: int) -> bool:
        start.wait()
        return put_create(uri, bytes([writer]))

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert won.count(True) == 1
    assert read_bytes(uri) == bytes([won.index(True)])


def contend(folder: str, contenders: int) -> list[bool]:
    start = Barrier(contenders)

    def one(number: int) -> bool:
        start.wait()
        with Lease(folder, 3.0) as lease:
            try:
                lease.take()
            except Interrupted:
                return False
            time.sleep(4.0)  # until the others have seen a sign of life
            lease.check()
            return True

    with ThreadPoolExecutor(contenders) as pool:
        return sorted(pool.map(one, range(contenders)))


def test_one_holder_of_the_lease_and_its_successor(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = f"{bucket}/out/_batch/key"
    with caplog.at_level(logging.INFO):
        assert contend(folder, 3) == [False, False, True]
    assert "create-only writes are honoured" in caplog.text
    with Lease(folder, 3.0) as lease:
        lease.take()
        assert (lease.epoch, lease.after_crash) == (2, False)
        assert list_names(folder) == ["lease-000002.json"]
        put_replace(f"{folder}/lease-000003.json", b"{}")
        with pytest.raises(Interrupted, match="took this job over"):
            lease.check()


def test_where_create_only_is_ignored_it_is_told_and_one_runner_is_left(
    unconditional: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"{unconditional}/out/_batch/key"
    assert put_create(f"{folder}/probe", b"one")
    assert put_create(f"{folder}/probe", b"two")  # what is the matter
    with caplog.at_level(logging.WARNING):
        assert contend(folder, 3) == [False, False, True]
    assert "this storage ignores create-only writes" in caplog.text
    assert not put_create(f"{folder}/probe", b"three")  # it is asked first from now on
    assert read_bytes(f"{folder}/probe") == b"two"
    with Lease(folder, 3.0) as lease:
        lease.take()
        (name,) = (name for name in list_names(folder) if name.startswith("lease-"))
        other = {**json.loads(read_bytes(f"{folder}/{name}")), "token": "another"}
        put_replace(f"{folder}/{name}", json.dumps(other).encode())
        with pytest.raises(Interrupted, match="took this job over"):
            lease.check()


def test_the_journal(bucket: str) -> None:
    folder = f"{bucket}/out/_batch/key"
    results = [RowResult(row, Status.OK, f"answer {row}") for row in range(25)]
    first = Journal(folder, 1, FINGERPRINT, 10)
    first.write(results[:15])
    first.write(results[15:])
    put_replace(f"{folder}/journal/000001-000002.arrow", read_bytes(f"{folder}/journal/000001-000001.arrow")[:100])
    again = Journal(folder, 2, FINGERPRINT, 10)
    assert again.read(lambda row, rows: row < 20) == {row: results[row] for row in range(20, 25)}
    again.prune(lambda row, rows: row < 20)
    assert list_names(f"{folder}/journal") == ["000001-000001.arrow"]


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

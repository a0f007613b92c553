"""What every test needs before its first import of Airflow or torch, in this process and in those that it starts."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator

import pytest

AIRFLOW_HOME = tempfile.mkdtemp(prefix="moegen-airflow-home-")
atexit.register(shutil.rmtree, AIRFLOW_HOME, ignore_errors=True)
os.environ |= {
    "AIRFLOW_HOME": AIRFLOW_HOME,
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    # Tiny models have no work for threads; on a busy machine they would only wait for each other.
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}

_LONGEST_FIRST = ("airflow", "service", "job", "cli", "engine")  # folders: what is begun last is waited for alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folder after folder."""
    rank = {folder: number for number, folder in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An S3 server over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a new bucket, which the usual chain of settings leads to."""
    import boto3
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # instances remember the endpoint of their first use
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.Session().client("s3").create_bucket(Bucket=name)  # the default session keeps its first credentials
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()

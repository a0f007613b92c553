"""A scratch Airflow for in-process tests; its settings must stand before the first `import airflow`."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

if "airflow" not in sys.modules:
    AIRFLOW_HOME = tempfile.mkdtemp(prefix="moegen-airflow-home-")
    atexit.register(shutil.rmtree, AIRFLOW_HOME, ignore_errors=True)
    os.environ |= {"AIRFLOW_HOME": AIRFLOW_HOME, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}

from tests.provider.fake_service import FakeService
from tests.provider.real_service import RealService


@pytest.fixture
def fake_service(monkeypatch):
    """A small real HTTP server with the contract's status codes, whose jobs the test moves by hand."""
    with FakeService() as service:
        monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", service.connection_uri)
        yield service


@pytest.fixture(scope="session")
def real_service(tmp_path_factory):
    """`moegen serve` in a child process."""
    with RealService(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    from tests.tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("model"))

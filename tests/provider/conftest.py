"""Job services for in-process tests: a small one whose jobs the test moves by hand, and the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

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

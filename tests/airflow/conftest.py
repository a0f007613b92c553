"""One real Airflow and one real job service for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.airflow.stage import Stage, build_stage
from tests.airflow.standalone import Standalone
from tests.provider.real_service import RealService


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    with RealService(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="session")
def stage(tmp_path_factory) -> Stage:
    return build_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="session")
def airflow(tmp_path_factory, service, stage):
    environment = {"AIRFLOW_CONN_MOEGEN_DEFAULT": service.connection_uri, "MOEGEN_DEMO_DIR": str(stage.folder)}
    environment |= {"AIRFLOW__CORE__PARALLELISM": "16"}  # tasks that wait on a worker hold it
    with Standalone(tmp_path_factory.mktemp("airflow_home"), stage.dags, **environment) as airflow:
        yield airflow

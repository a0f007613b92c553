"""The link from a task's page to its job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from airflow.sdk import BaseOperatorLink
from airflow.sdk.execution_time.xcom import XCom

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

JOB_URL = "moegen_job_url"  # XCom key, pushed before the task waits or defers


@attrs.define()
class MoegenJobLink(BaseOperatorLink):
    """The job's page at the service: state, progress, throughput, log."""

    @property
    def name(self) -> str:
        return "moegen job"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        return XCom.get_value(ti_key=ti_key, key=JOB_URL) or ""

"""What a task sees of Airflow while it runs: its ids and its XCom."""

from __future__ import annotations

from typing import Any


class TaskInstance:
    def __init__(self, dag_id="d", task_id="t", run_id="r", try_number=1, map_index=-1) -> None:
        self.dag_id, self.task_id, self.run_id = dag_id, task_id, run_id
        self.try_number, self.map_index = try_number, map_index
        self.xcom: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcom[key] = value


def context(**ids) -> dict[str, Any]:
    return {"ti": TaskInstance(**ids)}

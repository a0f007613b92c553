"""What a task sees of Airflow while it runs: its ids, its XCom, its state store, the events of its outlets."""

from __future__ import annotations

from typing import Any

from airflow.sdk.execution_time.context import OutletEventAccessors


class TaskInstance:
    def __init__(self, dag_id="d", task_id="t", run_id="r", try_number=1, map_index=-1, max_tries=0) -> None:
        self.dag_id, self.task_id, self.run_id = dag_id, task_id, run_id
        self.try_number, self.map_index, self.max_tries = try_number, map_index, max_tries
        self.xcom: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcom[key] = value


class StateStore(dict[str, Any]):
    """Airflow's keeps it in its database, over all attempts of a task."""

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self[key] = value


def context(store: StateStore | None = None, **ids) -> dict[str, Any]:
    found = {"ti": TaskInstance(**ids), "outlet_events": OutletEventAccessors()}
    return found if store is None else found | {"task_state_store": store}

"""One night under way: its Dag run, its task and its job."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pyarrow.parquet as pq

from tests.airflow.lane import Lane
from tests.airflow.nights import ROWS, TASK, Morning, Night
from tests.airflow.stage import Stage
from tests.airflow.standalone import Standalone
from tests.provider.real_service import wait_until

PATIENCE_S = 300


@dataclass
class Guest:
    """A night on stage. `begin` it, let something happen to it, and see how it is at the `end`."""

    night: Night
    airflow: Standalone
    lane: Lane
    stage: Stage
    model: str = "model"  # the checkpoint's folder on the stage; another one lacks its tokenizer
    seen: list[dict[str, Any]] = field(default_factory=list)  # of the XCom `progress`, without repetitions
    error: Exception | None = None  # what went wrong while it was played: of its own test, not of the others'
    run_id: str = field(init=False)
    key: str = field(init=False)

    def begin(self) -> Guest:
        """Starts the Dag run; returns as soon as the job is submitted and the task waits."""
        if self.model != "model":
            self.stage.model_without_tokenizer(self.model)
        conf = self.stage.conf(self.stage.table(self.night.name, ROWS), self.night.name)
        model = str(self.stage.folder / self.model)
        conf |= {"model_uri": model, "service": self.lane.name}
        self.run_id = self.airflow.trigger(self.night.dag_id, **conf)
        self.key = self._wait(self._submitted, "the job is submitted")
        self._wait(lambda: self._state in (self._waiting, "success", "failed"), f"the task is {self._waiting}")
        return self

    def play(self, event: Callable[[Guest], object]) -> Guest:
        """`begin`, and what happens then."""
        try:
            event(self.begin())
        except Exception as error:
            self.error = error
        return self

    @property
    def ids(self) -> tuple[str, str, str]:
        """Of the task, for Airflow's API."""
        return self.night.dag_id, self.run_id, TASK

    @property
    def job(self) -> dict[str, Any]:
        return self.lane.job(self.key)

    @property
    def outcome(self) -> Morning:
        """How it is now."""
        task = self.airflow.task(*self.ids)
        return Morning(
            self.job["state"], task["state"], task["try_number"], (len(self.lane.witness.cancels(self.key)),)
        )

    def rows(self) -> list[int] | None:
        """The rows of the output, if it is complete."""
        output = self.stage.folder / "out" / self.night.name
        return pq.read_table(output).column("row_index").to_pylist() if (output / "_SUCCESS").exists() else None

    def note_progress(self) -> None:
        """What the XCom `progress` says, if that is news."""
        progress = self.airflow.find_xcom(*self.ids, key="progress")
        if progress and progress not in self.seen:
            self.seen.append(progress)

    def log(self) -> str:
        """Of the latest attempt."""
        return json.dumps(json.loads(self.airflow.logs(*self.ids, self._try)), ensure_ascii=False)

    def processes(self) -> list[psutil.Process]:
        """Airflow's process on the worker, and the task's own below it."""
        task = psutil.Process(self.airflow.task(*self.ids)["pid"])
        return [task.parent(), task]

    def clear(self) -> None:
        self.airflow.clear(*self.ids)

    def mark_failed(self) -> None:
        self.airflow.mark_failed(*self.ids)

    def wait_try(self, number: int) -> None:
        """Until this attempt of the task waits for the job."""
        self._wait(lambda: (self._try, self._state) == (number, self._waiting), f"try {number} waits")

    def wait_owner(self, number: int) -> None:
        """Until this attempt of the task has taken the job over."""
        self._wait(lambda: self.job["owner"] == number, f"try {number} has attached")

    def wait_state(self, state: str) -> None:
        """Of the task."""
        self._wait(lambda: self._state == state, f"the task is {state}")

    def wait_job(self, state: str) -> None:
        self._wait(lambda: self.job["state"] == state, f"the job is {state}")

    def looks(self) -> int:
        """How many lines about rows the trigger of the latest attempt has written."""
        return self.airflow.logs(*self.ids, self._try).count("rows (")

    def wait_watched(self, looks: int = 0) -> None:
        """Until a deferred task's trigger has begun, after so many looks: Airflow calls `on_kill` of no other."""
        self._wait(lambda: self.looks() > looks, "the trigger polls")

    def end(self) -> None:
        """Until task and job have ended."""
        self._wait(lambda: self._state in ("success", "failed"), "the task ends")
        self._wait(lambda: self.job["state"] not in ("queued", "running"), "the job ends")

    @property
    def _waiting(self) -> str:
        return "deferred" if self.night.deferrable else "running"

    @property
    def _state(self) -> str | None:
        return self.airflow.task(*self.ids)["state"]

    @property
    def _try(self) -> int:
        return self.airflow.task(*self.ids)["try_number"]

    def _submitted(self) -> str | None:
        """The job's key, from the address that the task leaves for its link."""
        address = self.airflow.find_xcom(*self.ids, key="moegen_job_url")
        return address and address.rpartition("/")[2]

    def _wait(self, condition: Callable[[], Any], what: str) -> Any:
        try:
            return wait_until(condition, f"{self.night.name}: {what}", PATIENCE_S, 1)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.airflow.why(self.night.dag_id, self.run_id)}") from error

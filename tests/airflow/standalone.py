"""A real Airflow on this machine (sqlite, free ports, its own home) and its REST API.

What `airflow standalone` starts, but for one thing: the API for people and the API for tasks are two processes. Airflow
3.3 writes its audit log in the event loop. When a task's request holds sqlite's write lock at that moment, it waits for
the same loop before it commits, and both stand still until sqlite's timeout.
"""

from __future__ import annotations

import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from tests.provider.real_service import free_port, wait_until

ENDED = ("success", "failed")


class Standalone:
    """Starts in `with`, stops with all its processes at its end."""

    def __init__(self, home: Path, dags_folder: Path, **environment: str) -> None:
        self.home = home
        self.port, self._task_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | self._settings(dags_folder) | environment
        self._writing = threading.Lock()  # one request at a time: its database is sqlite
        self._beginning = threading.BoundedSemaphore(3)  # tasks; more of them make each other slow
        self._processes: list[subprocess.Popen[bytes]] = []
        self.client = httpx.Client(base_url=f"{self.url}/api/v2", timeout=150)

    def _settings(self, dags_folder: Path) -> dict[str, str]:
        programs = Path(sys.executable).parent
        return {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "ignore",
            "AIRFLOW_HOME": str(self.home),
            # The scheduler gives up when it finds sqlite locked for the usual five seconds.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.home}/airflow.db?timeout=60",
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self._task_port}/execution/",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "2",
            "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "3",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
            # On a busy machine the first trigger's first request takes half a minute: its process loads the tasks' API.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "90",
            "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "90",
            "AIRFLOW__TRIGGERER__RUNNER_HEALTH_CHECK_THRESHOLD": "90",
            "AIRFLOW__DAG_PROCESSOR__HEALTH_CHECK_THRESHOLD": "90",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",
        }

    def __enter__(self) -> Standalone:
        self.home.mkdir(parents=True, exist_ok=True)
        self._log = (self.home / "airflow.log").open("wb")
        try:
            self._prepare_database()
            self._start("api-server", "--apps", "core")
            self._start("api-server", "--apps", "execution", "--port", str(self._task_port))
            for command in ("scheduler", "dag-processor"):
                self._start(command)
            self._triggerer = self._start("triggerer")
            wait_until(self._healthy, "Airflow is healthy", timeout_s=300, interval_s=1)
            token = httpx.get(f"{self.url}/auth/token").raise_for_status().json()["access_token"]
            self.client.headers["Authorization"] = f"Bearer {token}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for process in self._processes:
            _end(process)
        self._log.close()

    def _prepare_database(self) -> None:
        """With a write-ahead log, which stays on: readers and a writer do not wait for each other."""
        with closing(sqlite3.connect(self.home / "airflow.db")) as database:
            assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        assert self._start("db", "migrate").wait(timeout=300) == 0, self._log_tail()
        self._processes.clear()

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        """An `airflow` command in a session of its own."""
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "airflow"), *command],
            env=self.environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def _healthy(self) -> bool:
        if ended := [process.args for process in self._processes if process.poll() is not None]:
            raise RuntimeError(f"{ended} ended: {self._log_tail()}")
        try:
            health = self.client.get("/monitor/health").json()
        except (httpx.HTTPError, ValueError):
            return False
        rooms = ("metadatabase", "scheduler", "triggerer", "dag_processor")
        return all(health.get(room, {}).get("status") == "healthy" for room in rooms)

    def _log_tail(self) -> str:
        return (self.home / "airflow.log").read_text(errors="replace")[-3000:]

    def restart_triggerer(self) -> None:
        """In order, as a redeploy does."""
        self._triggerer.terminate()
        self._triggerer.wait(timeout=60)
        self._triggerer = self._start("triggerer")

    def connect(self, connection_id: str, port: int) -> None:
        """A connection to a job service on this machine."""
        self.post(
            "/connections", {"connection_id": connection_id, "conn_type": "moegen", "host": f"http://127.0.0.1:{port}"}
        )

    def get(self, path: str) -> dict[str, Any]:
        return self.client.get(path).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._write("POST", path, body)

    def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._write("PATCH", path, body)

    def _write(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._writing:
            return self.client.request(method, path, json=body).raise_for_status().json()

    def trigger(self, dag_id: str, **conf: Any) -> str:
        """Starts a Dag run as soon as the Dag is there, and waits until a task of it has begun; its id."""
        wait_until(lambda: self.client.get(f"/dags/{dag_id}").is_success, f"Dag {dag_id} is there", 180, 1)
        with self._beginning:
            run_id = self.post(f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
            tasks = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
            begun = lambda: any(task["start_date"] for task in self.get(tasks)["task_instances"])  # noqa: E731
            wait_until(begun, f"a task of {dag_id} begins", 180, 0.5)
        return run_id

    def run(self, dag_id: str, timeout_s: float = 400, **conf: Any) -> str:
        """A Dag run to its end; its id. Fails unless its state is success."""
        run_id = self.trigger(dag_id, **conf)
        self.end(dag_id, run_id, timeout_s)
        return run_id

    def end(self, dag_id: str, run_id: str, timeout_s: float = 900) -> None:
        """Waits for a Dag run's end; fails unless its state is success."""
        state = wait_until(lambda: self._end_of(dag_id, run_id), f"Dag run {dag_id} ends", timeout_s, 1)
        assert state == "success", self.why(dag_id, run_id)

    def task(self, dag_id: str, run_id: str, task_id: str) -> dict[str, Any]:
        return self.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}")

    def mark_failed(self, dag_id: str, run_id: str, task_id: str) -> None:
        """What the button in the browser does."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        self.patch(path, {"new_state": "failed"})

    def clear(self, dag_id: str, run_id: str, task_id: str) -> None:
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": [task_id], "only_failed": False}
        self.post(f"/dags/{dag_id}/clearTaskInstances", body)

    def clear_run(self, dag_id: str, run_id: str) -> None:
        """All of its tasks; the run goes on from its first."""
        self.post(f"/dags/{dag_id}/clearTaskInstances", {"dry_run": False, "dag_run_id": run_id, "only_failed": False})

    def approve(self, dag_id: str, run_id: str, task_id: str) -> None:
        """What the button in the browser does."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/-1/hitlDetails"
        self.patch(path, {"chosen_options": ["Approve"], "params_input": {}})

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self.get(f"{path}?deserialize=true")["value"]

    def find_xcom(self, dag_id: str, run_id: str, task_id: str, key: str) -> Any:
        """None while there is none under this key."""
        answer = self.client.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}")
        return None if answer.status_code == 404 else answer.raise_for_status().json()["value"]

    def logs(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1) -> str:
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        return self.client.get(path, params={"full_content": True}, headers={"Accept": "application/json"}).text

    def why(self, dag_id: str, run_id: str) -> str:
        """States and log ends of a Dag run's tasks."""
        tasks = self.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances")["task_instances"]
        texts = [f"{t['task_id']}: {t['state']}\n{self._log_end(dag_id, run_id, t)}" for t in tasks]
        return "\n".join(texts)

    def _log_end(self, dag_id: str, run_id: str, task: dict[str, Any]) -> str:
        try:
            return self.logs(dag_id, run_id, task["task_id"], max(task["try_number"], 1))[-3000:]
        except httpx.HTTPError as error:
            return str(error)

    def _end_of(self, dag_id: str, run_id: str) -> str | None:
        state = self.get(f"/dags/{dag_id}/dagRuns/{run_id}")["state"]
        return state if state in ENDED else None


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.wait(timeout=20)

"""A real `moegen serve` in a child process, and a tiny checkpoint for its jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny import tiny_checkpoint

Job = dict[str, Any]
DEADLINE_S = 120.0


class Service:
    """One state folder, and the service that runs over it; it can be killed and started again."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.arguments = folder, arguments
        self.log = folder / "service.log"
        self.client = httpx.Client(timeout=30)

    def start(self) -> None:
        command = [sys.executable, "-m", "moegen", "serve", "--port", "0", "--state-dir", str(self.folder / "state")]
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.arguments], stdout=log, stderr=log)
        told = wait_for(lambda: re.search(r"running on (http://\S+)", self.log.read_text()[offset:]), "the service")
        self.client.base_url = httpx.URL(told[1])

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def put(self, key: str, spec: Job, owner: int = 0) -> httpx.Response:
        return self.client.put(f"/v1/jobs/{key}", params={"owner": owner}, json=spec)

    def job(self, key: str) -> Job:
        return dict(self.client.get(f"/v1/jobs/{key}").raise_for_status().json())

    def wait(self, key: str, until: Callable[[Job], bool]) -> Job:
        return wait_for(lambda: job if until(job := self.job(key)) else None, f"job {key}")

    def wait_end(self, key: str) -> Job:
        return self.wait(key, lambda job: job["state"] in ("succeeded", "failed", "cancelled"))

    def runners(self) -> list[int]:
        """The ids of the runner processes of this state folder."""
        return [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and f"{self.folder}/state/jobs" in _command_line(process)
        ]


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def wait_for(look: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {DEADLINE_S:.0f} s for {what}")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts a service over this test's folder; everything is ended with the test."""
    services: list[Service] = []

    def starter(*arguments: str) -> Service:
        service = Service(tmp_path, *arguments)
        services.append(service)
        service.start()
        return service

    yield starter
    for service in services:
        service.client.close()
        service.process.kill()
        service.process.wait()
        for runner in service.runners():
            os.kill(runner, signal.SIGKILL)


@pytest.fixture
def job_of(tmp_path: Path, model: Path) -> Callable[..., Job]:
    """A specification over a table of so many rows; `slow` gives it a middle in which things can happen to it."""

    def maker(name: str, rows: int = 20, slow: bool = False, **sampling: Any) -> Job:
        table = tmp_path / f"in-{rows}.jsonl"
        if not table.exists():  # written again it would be another input
            table.write_text("\n".join(json.dumps({"id": row, "prompt": f"Question {row}"}) for row in range(rows)))
        return {
            "job": {"name": name},
            "input": {"uri": str(table)},
            "prompt": {"column": "prompt"},
            "model": {"uri": str(model)},
            "sampling": {"max_tokens": 24 if slow else 4, "ignore_eos": slow, **sampling},
            "output": {"uri": str(tmp_path / name), "rows_per_part": 8},
            "engine": {"plan": {"kv_pages": 12, "page_tokens": 16} if slow else {}},
        }

    return maker

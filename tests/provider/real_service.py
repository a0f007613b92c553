"""`moegen serve` as a child process, for tests that need the real one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition, what: str, timeout_s: float = 60, interval_s: float = 0.3) -> Any:
    """The first true answer of `condition`; fails loudly at the deadline."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(interval_s)
    raise TimeoutError(f"{what}: not within {timeout_s:g} s")


class RealService:
    """Starts in `with`, stops (with its runner) at its end; state and log live in `folder`."""

    def __init__(self, folder: Path, token: str = "") -> None:
        self.folder = folder
        self.environment = os.environ | ({"MOEGEN_TOKEN": token} if token else {})
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.connection_uri = f"moegen://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)  # one: it loads the certificate authorities

    def __enter__(self) -> RealService:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "service.log").open("ab")
        command = [sys.executable, "-m", "moegen", "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--state-dir", str(self.folder / "state")],
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, env=self.environment,
        )  # fmt: skip
        try:
            wait_until(self._healthy, "moegen serve answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
                try:
                    self._process.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    continue
        self.client.close()
        self._log.close()

    def log_tail(self) -> str:
        return (self.folder / "service.log").read_text(errors="replace")[-2000:]

    def jobs(self) -> list[dict[str, Any]]:
        return self.client.get("/v1/jobs").raise_for_status().json()["jobs"]

    def job(self, key: str) -> dict[str, Any]:
        return self.client.get(f"/v1/jobs/{key}").raise_for_status().json()

    def _healthy(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"moegen serve ended with {self._process.returncode}: {self.log_tail()}")
        try:
            return self.client.get("/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

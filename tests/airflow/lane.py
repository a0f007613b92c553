"""A job service whose device can be held, and a witness of every request that reaches it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil

from tests.provider.real_service import RealService, wait_until


@dataclass(frozen=True)
class Request:
    """One answered request about one job; `state` and `job_owner` are those of the job in the answer."""

    method: str
    key: str
    owner: int
    status: int
    state: str
    job_owner: int


class Witness:
    """A proxy before a service: passes requests on, and remembers those about single jobs."""

    def __init__(self, upstream: str) -> None:
        self.requests: list[Request] = []
        self._upstream = httpx.Client(base_url=upstream, timeout=60)
        self._mutex = threading.Lock()
        witness = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                witness._pass_on(self)

            do_GET = do_PUT = do_POST = do_DELETE = _pass_on

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="witness", daemon=True)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._upstream.close()

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        headers = {name: handler.headers[name] for name in ("content-type",) if name in handler.headers}
        try:
            answer = self._upstream.request(handler.command, handler.path, content=body, headers=headers)
        except httpx.HTTPError:
            handler.close_connection = True  # as a service that is not there: no answer at all
            return
        self._note(handler.command, handler.path, answer)
        handler.send_response(answer.status_code)
        handler.send_header("content-type", answer.headers.get("content-type", "text/plain"))
        handler.send_header("content-length", str(len(answer.content)))
        handler.end_headers()
        handler.wfile.write(answer.content)

    def _note(self, method: str, path: str, answer: httpx.Response) -> None:
        url = urlsplit(path)
        place, _, key = url.path.rpartition("/")
        if place != "/v1/jobs" or not answer.is_success:
            return
        owner = int(parse_qs(url.query).get("owner", ["0"])[0])
        job = json.loads(answer.content)
        with self._mutex:
            self.requests.append(Request(method, key, owner, answer.status_code, job["state"], job["owner"]))

    def submitted(self, key: str) -> int:
        """How many times a job was made under this key."""
        return sum((seen.method, seen.key, seen.status) == ("PUT", key, 201) for seen in self.requests)

    def cancels(self, key: str) -> list[Request]:
        """The requests that cancelled the job."""
        found, state = [], ""
        for seen in [seen for seen in self.requests if seen.key == key]:
            if seen.method == "DELETE" and seen.state == "cancelled" != state:
                found.append(seen)
            state = seen.state
        return found


class Lane(RealService):
    """A service of its own for some nights, so that they do not queue behind the others."""

    BUSY = "busy"  # the key of the job that only holds the device

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.name = folder.name  # of the connection, too
        self.witness = Witness(self.url)

    def __enter__(self) -> Lane:
        super().__enter__()
        self.witness.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.witness.__exit__()
        super().__exit__()

    def kill(self) -> None:
        """The service is gone at once; its runner finds out."""
        self._process.kill()
        self._process.wait(timeout=15)
        self._log.close()

    def start(self) -> None:
        """Again, on the same state folder."""
        super().__enter__()

    def cancel(self, key: str) -> None:
        """As somebody would who has looked the owner up."""
        owner = self.job(key)["owner"]
        address = f"http://127.0.0.1:{self.witness.port}/v1/jobs/{key}"
        self.client.delete(address, params={"owner": owner}).raise_for_status()

    def runners(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children()

    def wait_saved(self, key: str) -> None:
        """Until the job has saved rows; it must not have ended by then."""
        wait_until(lambda: self._saved(self.job(key)), "the job is half way", 300, 0.05)

    def _saved(self, job: dict[str, Any]) -> bool:
        assert job["state"] in ("queued", "running"), f"the job is {job['state']} before it was caught half way"
        progress = job["progress"] or {}
        return 0 < progress.get("rows_saved", 0) < progress["rows_total"]

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        """The job stands still half way until the block ends."""
        self.wait_saved(key)
        with self._stopped():
            yield

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Until the block ends a job has the device and computes nothing; all others queue."""
        least = {
            "input": {"uri": "in"},
            "prompt": {"column": "text"},
            "model": {"uri": "model"},
            "output": {"uri": "out"},
        }
        job = f"{self.url}/v1/jobs/{self.BUSY}"
        self.client.put(job, json=least | {"sampling": {"max_tokens": 1}}).raise_for_status()
        wait_until(self.runners, "the runner has started", 60, 0.02)
        with self._stopped():
            yield
            self.client.delete(job).raise_for_status()

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        (runner,) = self.runners()
        os.kill(runner.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if runner.is_running():
                os.kill(runner.pid, signal.SIGCONT)

"""The contract of docs/http-api.md in memory, on a real socket, for the paths that a real service takes rarely."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

TOKEN = "right-token"
ENDED = ("succeeded", "failed", "cancelled")


class FakeService:
    """`jobs` are the test's to change; `replies` are sent, in order, instead of real answers."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.specs: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.replies: list[Response] = []
        self.input_version = "1"  # of whatever table a job names
        self.output: dict[str, str | None] = {"output": "free", "output_detail": None}  # of whatever folder
        self.refusal: str | None = None  # of every pre-flight
        self.log = ""  # of every job's runner
        self.on_get = lambda job: None  # moves a job just before it is shown
        self._socket = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(self._app(), log_level="error", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def connection_uri(self) -> str:
        return f"moegen://:{TOKEN}@{self.url.removeprefix('http://')}"

    def __enter__(self) -> FakeService:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def add(self, key: str, state: str = "running", **fields: Any) -> dict[str, Any]:
        """A job; `fields` as in the contract."""
        job = {
            "key": key, "name": "", "state": state, "owner": 0, "queue_position": 0, "created_at": time.time(),
            "queued_at": time.time(), "started_at": None, "ended_at": None, "attempts": 1, "exit_code": None,
            "error": None, "output_uri": "", "progress": None, "manifest": None,
        }  # fmt: skip
        self.jobs[key] = job | fields
        return self.jobs[key]

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.requests]

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def scripted(request: Request, call_next):
            self.requests.append((request.method, request.url.path, dict(request.query_params)))
            if self.replies:
                return self.replies.pop(0)
            if request.url.path != "/health" and request.headers.get("authorization") != f"Bearer {TOKEN}":
                return JSONResponse({"detail": "the token is wrong"}, 401)
            return await call_next(request)

        @app.get("/health")
        def health():
            return {"status": "ok", "version": "9.9", "running": None, "queued": 0}

        @app.get("/v1/jobs")
        def jobs(state: str | None = None):
            return {"jobs": [job for job in self.jobs.values() if state in (None, job["state"])]}

        @app.put("/v1/jobs/{key}")
        async def submit(key: str, request: Request, owner: int = 0):
            return self._submit(key, await request.json(), owner)

        @app.get("/v1/jobs/{key}")
        def job(key: str):
            if key in self.jobs:
                self.on_get(self.jobs[key])
            return self._job(key)

        @app.delete("/v1/jobs/{key}")
        def cancel(key: str, owner: int = 0):
            job = self.jobs.get(key)
            if job and job["state"] not in ENDED and owner >= job["owner"]:
                job["state"] = "cancelled"
            return self._job(key)

        @app.get("/v1/jobs/{key}/logs")
        def logs(key: str, tail: int = 200, offset: int | None = None):
            if offset is None:
                return PlainTextResponse(f"the last {tail} lines")
            text = self.log[offset:] if offset >= 0 else ""
            return PlainTextResponse(text, headers={"X-Log-Offset": str(len(self.log))})

        @app.post("/v1/preflight")
        async def preflight(request: Request):
            if self.refusal is not None:
                return JSONResponse({"detail": self.refusal}, 422)
            work = {name: value for name, value in (await request.json()).items() if name not in ("job", "errors")}
            named = json.dumps([work, self.input_version], sort_keys=True)
            fingerprint = hashlib.sha256(named.encode()).hexdigest()
            return {"fingerprint": fingerprint, "files": 1, "size_bytes": 1, **self.output}

        return app

    def _submit(self, key: str, spec: dict[str, Any], owner: int) -> JSONResponse:
        if "max_tokens" not in spec["sampling"]:
            return JSONResponse({"detail": "sampling.max_tokens: missing; it has no default"}, 422)
        if _work(self.specs.setdefault(key, spec)) != _work(spec):
            return JSONResponse({"detail": f"key {key} belongs to another specification"}, 409)
        status = 200 if key in self.jobs else 201
        job = self.jobs.get(key) or self.add(key, "queued", queue_position=1)
        job["owner"] = max(owner, job["owner"])
        if job["state"] in ("failed", "cancelled"):
            job |= {"state": "queued", "queued_at": time.time()}
        return JSONResponse(job, status)

    def _job(self, key: str) -> JSONResponse:
        if key not in self.jobs:
            return JSONResponse({"detail": f"no job {key}"}, 404)
        return JSONResponse(self.jobs[key])


def _work(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name not in ("job", "errors", "engine", "output")}

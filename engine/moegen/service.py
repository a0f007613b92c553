"""`moegen serve`: the job service of docs/http-api.md. It never imports torch: a runner process per job does."""

from __future__ import annotations

import ipaddress
import json
import secrets
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

import moegen
from moegen.answer.grammar import grammar_text
from moegen.errors import InputError, MoegenError, SpecError, StorageError
from moegen.job import records
from moegen.job.allowed import AllowedUris
from moegen.job.inbox import Inbox, TableConflict, TableTooLarge
from moegen.job.preflight import Preflight, preflight
from moegen.job.records import KeyConflict, Record
from moegen.job.results import result_lines
from moegen.job.runner import Supervisor
from moegen.job.store import JobStore
from moegen.openapi import (
    JOB_BODY,
    TABLE_BODY,
    Health,
    JobList,
    JobView,
    TableUris,
    answers,
    created,
    document,
)
from moegen.pages.routes import add_pages
from moegen.spec import JobSpec, JobState
from moegen.units import KIB, MIB

_BODY_LIMIT_BYTES = 4 * MIB  # of a job specification


@dataclass(frozen=True)
class ServiceConfig:
    """How the service is reached, and what it lets jobs do."""

    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 8765  # 0: any free port, told in the log
    token: str | None = None  # what requests must bear; may be left out on loopback only
    allowed: AllowedUris = field(default_factory=AllowedUris)

    def __post_init__(self) -> None:
        if self.token is None and not _is_loopback(self.host):
            raise SpecError(
                f"--host: {self.host!r} can be reached from other machines; give --token-file or MOEGEN_TOKEN, "
                "or bind to 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(config: ServiceConfig) -> None:
    """Run the service until SIGTERM or SIGINT; a running job is interrupted and goes on with the next service.

    Raises:
        SpecError: another service uses the state folder.
        StorageError: the state folder cannot be used.
        MoegenError: the address cannot be bound.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends on them, then raises them again
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), JobStore(config.state_dir) as store, Supervisor(store) as supervisor:
        app = create_app(store, supervisor, config.token, config.allowed)
        server = uvicorn.Server(uvicorn.Config(app, config.host, config.port, log_config=None, access_log=False))
        try:
            server.run()
        except SystemExit as exit_:  # uvicorn has logged why
            raise MoegenError(f"the service cannot listen on {config.host}:{config.port}") from exit_


def create_app(store: JobStore, supervisor: Supervisor, token: str | None, allowed: AllowedUris) -> FastAPI:
    """The HTTP side over a store and its supervisor, both entered already."""
    app = FastAPI(title="moegen", version=moegen.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(MoegenError, _moegen_error)
    registry = CollectorRegistry()
    registry.register(_Metrics(store))
    private = [Depends(_bearer(token))]
    inbox = Inbox(store.state_dir)
    readable = allowed.beside(str(inbox.folder.absolute()))

    @app.put(
        "/v1/jobs/{key}", dependencies=private, openapi_extra=JOB_BODY,
        responses={**answers(JobView, 401, 409, 413, 422), **created(JobView)},
    )  # fmt: skip
    async def put_job(key: str, request: Request, owner: Annotated[int, Query(ge=0)] = 0) -> JSONResponse:
        body = await _body(request)
        return await run_in_threadpool(submit, key, body, owner)

    def submit(key: str, body: bytes, owner: int) -> JSONResponse:
        spec = _specification(body)
        readable.check(spec)
        grammar_text(spec)  # a form that cannot be compiled is refused now, not when the job's turn comes
        record, is_new = store.submit(key, spec, owner, time.time())
        supervisor.wake()
        return JSONResponse(job_view(store, record), 201 if is_new else 200)

    @app.get("/v1/jobs", dependencies=private, responses=answers(JobList, 401, 422))
    def list_jobs(state: JobState | None = None) -> dict[str, Any]:
        return {"jobs": [job_view(store, record) for record in store.all() if state in (None, record.state)]}

    @app.get("/v1/jobs/{key}", dependencies=private, responses=answers(JobView, 401, 404, 422))
    def get_job(key: str) -> dict[str, Any]:
        paused = _known(store, key).state is JobState.PAUSED
        record = store.ask(key, time.time())
        assert record is not None  # jobs are not removed
        if paused:
            supervisor.wake()
        return job_view(store, record)

    @app.delete("/v1/jobs/{key}", dependencies=private, responses=answers(JobView, 401, 404, 422))
    def delete_job(key: str, owner: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        _known(store, key)
        return job_view(store, store.update(key, lambda record: records.cancel(record, owner, time.time())))

    @app.get(
        "/v1/jobs/{key}/logs", dependencies=private, response_class=PlainTextResponse,
        responses=answers("text/plain", 401, 404, 422),
    )  # fmt: skip
    def get_logs(
        key: str,
        tail: Annotated[int, Query(ge=0)] = 200,
        offset: Annotated[int | None, Query(ge=-1, lt=1 << 62)] = None,
    ) -> PlainTextResponse:
        record = _known(store, key)
        if offset is None:
            return PlainTextResponse(store.log_tail(record, tail))
        lines, end = store.log_after(record, offset)
        return PlainTextResponse(lines.decode(errors="replace"), headers={"X-Log-Offset": str(end)})

    @app.get(
        "/v1/jobs/{key}/rows", dependencies=private, response_class=StreamingResponse,
        responses=answers("application/x-ndjson", 401, 404, 409, 422),
    )  # fmt: skip
    def get_rows(key: str) -> StreamingResponse:
        record = _known(store, key)
        manifest = store.status(record).manifest
        if record.state is not JobState.SUCCEEDED or manifest is None:
            raise HTTPException(409, f"job {key!r} is {record.state.value}; its rows can be had once it has succeeded")
        lines = result_lines(record.spec["output"]["uri"], manifest)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @app.post(
        "/v1/preflight", dependencies=private, openapi_extra=JOB_BODY,
        responses=answers(Preflight, 401, 413, 422, 502),
    )  # fmt: skip
    async def post_preflight(request: Request) -> dict[str, Any]:
        body = await _body(request)
        return await run_in_threadpool(look_ahead, body)

    def look_ahead(body: bytes) -> dict[str, Any]:
        spec = _specification(body)
        readable.check(spec)
        grammar_text(spec)
        return asdict(preflight(spec))

    @app.put(
        "/v1/tables/{name}", dependencies=private, openapi_extra=TABLE_BODY,
        responses={**answers(TableUris, 401, 409, 413, 422, 502), **created(TableUris)},
    )  # fmt: skip
    async def put_table(name: str, request: Request) -> JSONResponse:
        is_new = await inbox.put(name, request.stream())
        return JSONResponse(inbox.uris(name), 201 if is_new else 200)

    @app.get("/health", responses=answers(Health))
    def health() -> dict[str, Any]:
        running = [record.key for record in store.all() if record.state is JobState.RUNNING]
        return {
            "status": "ok",
            "version": moegen.__version__,
            "running": running[0] if running else None,
            "queued": len(store.queue()),
        }

    @app.get(
        "/metrics", dependencies=private, response_class=PlainTextResponse,
        responses=answers("text/plain", 401),
    )  # fmt: skip
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", dependencies=private, responses=answers(dict, 401))
    def openapi() -> dict[str, Any]:
        return document(app, token=token is not None)

    add_pages(app, store, token)
    return app


def job_view(store: JobStore, record: Record) -> dict[str, Any]:
    """The job as docs/http-api.md shows it."""
    status = store.status(record)
    queued = [waiting.key for waiting in store.queue()] if record.state is JobState.QUEUED else []
    times = ("created_at", "queued_at", "started_at", "ended_at")
    shown = ("key", "state", "owner", *times, "attempts", "exit_code", "error")
    values = asdict(record)
    return {
        **{name: values[name] for name in shown},
        "name": record.spec["job"]["name"],
        "queue_position": queued.index(record.key) + 1 if record.key in queued else 0,
        "output_uri": record.spec["output"]["uri"],
        "progress": status.progress,
        "manifest": status.manifest if record.state is JobState.SUCCEEDED else None,
    }


# --- requests -------------------------------------------------------------------------------------------------------


def _bearer(token: str | None) -> Any:
    expected = f"Bearer {token}".encode()

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not secrets.compare_digest(given, expected):
            raise HTTPException(401, "no valid token; send Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    return check


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_LIMIT_BYTES:
            raise HTTPException(
                413, f"the body is longer than {_BODY_LIMIT_BYTES // KIB} KiB; a specification is small"
            )
    return body


def _specification(body: bytes) -> JobSpec:
    try:
        mapping = json.loads(body)
        json.dumps(mapping, ensure_ascii=False).encode()  # JSON can write half a character; no file or answer can
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the body is not JSON that UTF-8 can hold: {error}") from error
    return JobSpec.from_mapping(mapping)


def _known(store: JobStore, key: str) -> Record:
    record = store.get(key)
    if record is None:
        raise HTTPException(404, f"there is no job {key!r}; PUT it first")
    return record


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = (f"{problem['loc'][-1]}: {problem.get('input')!r}: {problem['msg']}" for problem in error.errors())
    return JSONResponse({"detail": "; ".join(problems)}, 422)


async def _moegen_error(request: Request, error: Exception) -> JSONResponse:
    code = next((code for kinds, code in _CODES.items() if isinstance(error, kinds)), 500)
    return JSONResponse({"detail": str(error)}, code)


_CODES: dict[tuple[type[MoegenError], ...], int] = {
    (KeyConflict, TableConflict): 409,
    (TableTooLarge,): 413,
    (SpecError, InputError): 422,
    (StorageError,): 502,
}


# --- metrics --------------------------------------------------------------------------------------------------------


_ENGINE_METRICS = {
    "running": "Sequences in flight.",
    "passes": "Passes of this attempt.",
    "starved_s": "Seconds of this attempt in which the device waited for weights.",
    "s_mfu": "FLOPs of activated parameters and attention as a share of the peak, over the last minutes.",
    "s_mbu": "Bytes that had to move as a share of the peak bandwidth, over the last minutes.",
    "disk_utilisation": "Bytes read as a share of the disk's rate, over the last minutes.",
    "link_utilisation": "Bytes copied as a share of the link's rate, over the last minutes.",
    "overlap": "Share of the transfers' time hidden behind compute, over the last minutes.",
}


class _Metrics:
    """What Prometheus sees, read from the store at every scrape."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = self._store.all()
        states = Counter(record.state for record in jobs)
        yield _gauge("moegen_jobs", "Jobs by state.", "state", {state.value: states[state] for state in JobState})
        progress = [self._store.status(record).progress or {} for record in jobs]
        rows: Counter[str] = Counter()
        for job in progress:
            rows.update(job.get("statuses", {}))
        # Gauges: an attempt that is lost takes back the rows that it had not committed.
        yield _gauge("moegen_rows_done", "Rows done in all known jobs, by status.", "status", rows)
        tokens = {kind: sum(job.get(f"{kind}_tokens", 0) for job in progress) for kind in ("prompt", "completion")}
        yield _gauge("moegen_tokens_done", "Tokens of the rows done, by kind.", "kind", tokens)
        queued = float(len(self._store.queue()))
        yield GaugeMetricFamily("moegen_queue_length", "Jobs that wait for the device.", value=queued)
        now = [job for record, job in zip(jobs, progress, strict=True) if record.state is JobState.RUNNING]
        for name, what in (("rows_per_s", "Rows ended"), ("tokens_per_s", "Tokens generated")):
            value = sum(job.get(name, 0.0) for job in now)
            yield GaugeMetricFamily(f"moegen_{name}", f"{what} per second by the running job.", value=value)
        yield from _engine_metrics([job["engine"] for job in now if job.get("engine")])


def _engine_metrics(engines: list[dict[str, Any]]) -> Iterator[GaugeMetricFamily]:
    """Of the running job's attempt; what it does not measure has no sample."""
    engine = engines[0] if engines else {}  # one job runs at a time
    for name, text in _ENGINE_METRICS.items():
        yield GaugeMetricFamily(f"moegen_{name}", text, value=engine.get(name))
    moved = {place: count for place in ("disk", "link") if (count := engine.get(f"{place}_bytes")) is not None}
    yield _gauge("moegen_bytes_streamed", "Bytes of weights that this attempt moved, by way.", "way", moved)


def _gauge(name: str, text: str, label: str, values: dict[str, int] | Counter[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family

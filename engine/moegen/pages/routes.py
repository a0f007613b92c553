"""Where the pages are, who may see them, and what browsers are told about them.

The rule is that of the JSON endpoints: with a token, nothing is shown without it. Browsers cannot send a bearer token
by themselves, so the pages also take it as the password of HTTP Basic authentication, which every browser asks for.
A browser then sends it along with whatever leads to this service, from whatever page: that is why only these pages
take it, which change nothing, and no endpoint that does. No page may be framed, nothing is cached, and nothing that is
shown can run or fetch anything.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse

from moegen.errors import InputError, SpecError, StorageError
from moegen.job.records import Record
from moegen.job.store import JobStore
from moegen.openapi import answers
from moegen.openapi import page as page_of
from moegen.pages.frame import REFRESH_S, missing_page, short
from moegen.pages.job import job_page
from moegen.pages.jobs import jobs_page
from moegen.report.page import report
from moegen.spec import JobState

_ALL_LINES = 1 << 40
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_HTML, _TEXT, _JSON = "text/html", "text/plain", "application/json"


_PAGE = {**answers(_HTML, 401, 422), **page_of(404)}

Refresh = Annotated[int, Query(ge=0, le=3600)]


def add_pages(app: FastAPI, store: JobStore, token: str | None) -> None:
    """`/jobs` and what is below it, over an entered store."""
    private = [Depends(_password(token))]

    @app.get("/jobs", dependencies=private, response_class=HTMLResponse, responses=answers(_HTML, 401, 422))
    def get_jobs(page: Annotated[int, Query(ge=1, le=1_000_000)] = 1, refresh: Refresh = REFRESH_S) -> Response:
        return _shown(jobs_page(store, page, refresh, time.time()))

    @app.get(
        "/jobs/{key}/log",
        dependencies=private,
        response_class=PlainTextResponse,
        responses=_PAGE | answers(_TEXT),
    )
    def get_job_log(key: str, request: Request) -> Response:
        record = store.get(key)
        return _unknown(key, request) if record is None else _shown(store.log_tail(record, _ALL_LINES), _TEXT)

    @app.get("/jobs/{key}/manifest", dependencies=private, responses=_PAGE | answers(dict))
    def get_job_manifest(key: str, request: Request) -> Response:
        record = store.get(key)
        if record is None:
            return _unknown(key, request)
        manifest = store.status(record).manifest if record.state is JobState.SUCCEEDED else None
        if manifest is None:
            return _missing("No manifest", "The job has not succeeded: its manifest comes last.", request)
        return _shown(json.dumps(manifest, indent=2), _JSON)

    @app.get(
        "/jobs/{key}/report",
        dependencies=private,
        response_class=HTMLResponse,
        responses={**answers(_HTML, 401, 422), **page_of(404, 502)},
    )
    def get_job_report(key: str, request: Request) -> Response:
        record = store.get(key)
        return _unknown(key, request) if record is None else _report(record, request)

    @app.get(
        "/jobs/{key:path}",
        dependencies=private,
        response_class=HTMLResponse,
        responses={**answers(_HTML, 401, 422), **page_of(404)},
    )
    def get_job_page(key: str, request: Request, refresh: Refresh = REFRESH_S) -> Response:
        if not key:
            return RedirectResponse("../jobs", headers=_HEADERS)
        record = store.get(key)
        return _unknown(key, request) if record is None else _shown(job_page(store, record, refresh, time.time()))


def _report(record: Record, request: Request) -> Response:
    try:
        return _shown(report(record.spec["output"]["uri"]))
    except (InputError, SpecError) as error:
        return _missing("No report", str(error), request)
    except StorageError as error:
        return _missing("No report", str(error), request, 502)


def _unknown(key: str, request: Request) -> Response:
    return _missing("No such job", f"This service knows no job {short(key, 200)!r}.", request)


def _missing(title: str, text: str, request: Request, status_code: int = 404) -> Response:
    # Browsers count the slashes that are written as such, and what stands before our own path is not ours to know.
    home = "../" * (request.scope["raw_path"].count(b"/") - 1) + "jobs"
    return _shown(missing_page(title, text, home), status_code=status_code)


def _shown(content: str, media_type: str = _HTML, status_code: int = 200) -> Response:
    # What others wrote may hold characters that no encoding has: a page is worth more than their exactness.
    return Response(content.encode(errors="replace"), status_code, _HEADERS, f"{media_type}; charset=utf-8")


def _password(token: str | None) -> Any:
    def check(request: Request) -> None:
        if token is not None and not secrets.compare_digest(_given(request).encode(), token.encode()):
            raise HTTPException(
                401,
                "no valid token; give it as the password, with any user name",
                {"WWW-Authenticate": 'Basic realm="moegen", charset="UTF-8"'},
            )

    return check


def _given(request: Request) -> str:
    """The token that the request bears, as a bearer token or as a password; "" for none."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:  # not ASCII, not base64, not UTF-8
        return ""

"""The service's OpenAPI document: what `docs/http-api.md` says, for programs.

FastAPI knows paths and parameters. What bodies are, which refusals there are, and how a token is given is said here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from moegen.job.preflight import Preflight
from moegen.spec import JobSpec, JobState

_REFUSALS = {
    401: "no valid token",
    404: "there is no such job",
    409: "the key or the name belongs to something else, or the job has not succeeded",
    413: "the body is too long",
    422: "a parameter or the specification cannot be used",
    502: "storage refused",
}
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Problem:
    """What is wrong, which value, what to do."""

    detail: str


@dataclass(frozen=True)
class JobView:
    """A job."""

    key: str
    name: str
    state: JobState
    owner: int
    queue_position: int
    created_at: float
    queued_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    exit_code: int | None
    error: str | None
    output_uri: str
    progress: dict[str, Any] | None
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class JobList:
    """All jobs, oldest first."""

    jobs: list[JobView]


@dataclass(frozen=True)
class TableUris:
    """What a job over a table that was sent names as its input and its output."""

    input_uri: str
    output_uri: str


@dataclass(frozen=True)
class Health:
    """Whether the service is there, and what it does."""

    status: str
    version: str
    running: str | None
    queued: int


def answers(what: type | str, *codes: int) -> dict[int | str, dict[str, Any]]:
    """A route's answers: JSON of a class, or text of a media type; and the refusals by their status codes."""
    found: dict[int | str, dict[str, Any]] = {200: _answer("done", what)}
    return found | {code: _answer(_REFUSALS[code], Problem) for code in codes}


def created(what: type) -> dict[int | str, dict[str, Any]]:
    """Besides `answers`, where something may be new."""
    return {201: _answer("it is new", what)}


def page(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Besides `answers`, refusals that are pages for people."""
    return {code: _answer("a page that says why", "text/html") for code in codes}


def _answer(description: str, what: type | str) -> dict[str, Any]:
    if isinstance(what, str):
        return {"description": description, "content": {what: {"schema": {"type": "string"}}}}
    schema = {"type": "object"} if what is dict else {"$ref": _REF.format(model=what.__name__)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


TABLE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}
}
JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=JobSpec.__name__)}}},
    }
}


def document(app: FastAPI, *, token: bool) -> dict[str, Any]:
    """The document of an app whose routes are all there; `token`: whether requests must bear one."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    found["components"] = {"schemas": {**_specification(), **_views()}}
    if token:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "password": {"type": "http", "scheme": "basic", "description": "any user name; the pages below /jobs only"},
        }
    for path, operations in found["paths"].items():
        open_to_all = not token or path == "/health"
        ways = ("bearer", "password") if path.startswith("/jobs") else ("bearer",)
        for operation in operations.values():
            operation["security"] = [] if open_to_all else [{way: []} for way in ways]
            if open_to_all:
                operation["responses"].pop("401", None)
            for answer in operation["responses"].values():
                _keep_reference(answer)
    return found


def _keep_reference(answer: dict[str, Any]) -> None:
    """Without what FastAPI makes of the function's annotation."""
    for body in answer.get("content", {}).values():
        if "$ref" in body["schema"]:
            body["schema"] = {"$ref": body["schema"]["$ref"]}


def _views() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for view in (Problem, JobView, JobList, Preflight, TableUris, Health):
        whole = TypeAdapter(view).json_schema(ref_template=_REF)
        schemas |= {**whole.pop("$defs", {}), view.__name__: whole}
    return schemas


def _specification() -> dict[str, Any]:
    """JSON Schemas of the specification and its sections. Ranges are not in them: a body may still be refused."""
    whole = TypeAdapter(JobSpec).json_schema(ref_template=_REF)
    schemas: dict[str, Any] = {**whole.pop("$defs"), JobSpec.__name__: whole}
    for schema in schemas.values():
        schema["additionalProperties"] = False
    whole["properties"]["output_schema"] = {
        "anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}], "default": None,
    }  # fmt: skip
    return schemas

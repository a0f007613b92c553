"""The job service's HTTP API (docs/http-api.md), synchronous and asynchronous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from airflow.sdk import BaseHook

from moegen_airflow.endpoint import Endpoint
from moegen_airflow.exceptions import MoegenError, MoegenInputError, MoegenJobNotFoundError, MoegenUnavailableError

Job = dict[str, Any]  # a job as docs/http-api.md shows it


class MoegenHook(BaseHook):
    """A moegen job service, by the id of its Airflow connection.

    Connection: host = URL (or host, port and schema http/https), password = bearer token; extra fields
    `default_model`, `verify_ssl` (true), `ca_cert` (path of a PEM file), `request_timeout` (30 s).
    Nothing is read or sent before the first call. Every call has an `a…` twin for event loops.

    All calls raise:
        MoegenInputError: the connection, the token or the request can never be accepted as they are.
        MoegenJobNotFoundError: there is no job under this key.
        MoegenUnavailableError: no usable answer; the same call may succeed later.
    """

    conn_name_attr = "moegen_conn_id"
    default_conn_name = "moegen_default"
    conn_type = "moegen"
    hook_name = "moegen"

    def __init__(self, moegen_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.moegen_conn_id = moegen_conn_id
        self._endpoint: Endpoint | None = None

    @property
    def endpoint(self) -> Endpoint:
        """The connection, looked up once."""
        if self._endpoint is None:
            connection = self.get_connection(self.moegen_conn_id)
            self._endpoint = Endpoint.from_connection(connection, connection.extra_dejson)
        return self._endpoint

    async def aendpoint(self) -> Endpoint:
        if self._endpoint is None:
            connection = await self.aget_connection(self.moegen_conn_id)
            # Core's secrets backends (a connections file, say) give a Connection that knows only the property.
            read = getattr(connection, "aextra_dejson", None)
            extra = connection.extra_dejson if read is None else await read()
            self._endpoint = Endpoint.from_connection(connection, extra)
        return self._endpoint

    def get_conn(self) -> httpx.Client:
        """A client for the service; use it in a `with`."""
        return httpx.Client(**self.endpoint.client_options)

    def job_url(self, key: str) -> str:
        """The job's page for people; the service asks for its token as the password."""
        return f"{self.endpoint.url}/jobs/{key}"

    def submit_job(self, key: str, spec: Mapping[str, Any], owner: int = 0) -> Job:
        """Queues the job under `key`, or attaches to it; a failed or cancelled one resumes. Idempotent."""
        return _job(self._send(_submit(key, spec, owner)))

    async def asubmit_job(self, key: str, spec: Mapping[str, Any], owner: int = 0) -> Job:
        return _job(await self._asend(_submit(key, spec, owner)))

    def preflight(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the service found out about a job without a device: `fingerprint` of specification and input, and more.

        Raises besides:
            MoegenInputError: no input or no row in it, no such column, no such model; the message says which.
        """
        found = _body(self._send(_preflight(spec)))
        if not isinstance(found.get("fingerprint"), str):
            raise MoegenUnavailableError(f"{self.endpoint.url}: the answer to a pre-flight has no fingerprint")
        return found

    async def apreflight(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        return _body(await self._asend(_preflight(spec)))

    def get_job(self, key: str) -> Job:
        return _job(self._send(_Call("GET", f"/v1/jobs/{key}")))

    async def aget_job(self, key: str) -> Job:
        return _job(await self._asend(_Call("GET", f"/v1/jobs/{key}")))

    def look(self, key: str) -> Job | MoegenError:
        """`get_job` for loops that outlive a failed call: the error is the answer."""
        try:
            return self.get_job(key)
        except MoegenError as error:
            return error

    async def alook(self, key: str) -> Job | MoegenError:
        try:
            return await self.aget_job(key)
        except MoegenError as error:
            return error

    def cancel_job(self, key: str, owner: int = 0) -> Job:
        """Cancels the job unless a newer owner has taken it over; the job after the request."""
        return _job(self._send(_Call("DELETE", f"/v1/jobs/{key}", {"owner": owner})))

    async def acancel_job(self, key: str, owner: int = 0) -> Job:
        return _job(await self._asend(_Call("DELETE", f"/v1/jobs/{key}", {"owner": owner})))

    def list_jobs(self, state: str | None = None) -> list[Job]:
        """All jobs, oldest first; or those in one state."""
        return _jobs(self._send(_list(state)))

    async def alist_jobs(self, state: str | None = None) -> list[Job]:
        return _jobs(await self._asend(_list(state)))

    def get_logs(self, key: str, tail: int = 200) -> str:
        """The last `tail` lines of the job's runner."""
        return self._send(_Call("GET", f"/v1/jobs/{key}/logs", {"tail": tail})).text

    async def aget_logs(self, key: str, tail: int = 200) -> str:
        return (await self._asend(_Call("GET", f"/v1/jobs/{key}/logs", {"tail": tail}))).text

    def get_new_log(self, key: str, offset: int = -1) -> tuple[str, int]:
        """What the runner has printed after `offset` (-1: nothing yet), and the offset for the next call."""
        return _log(self._send(_new_log(key, offset)))

    async def aget_new_log(self, key: str, offset: int = -1) -> tuple[str, int]:
        return _log(await self._asend(_new_log(key, offset)))

    def test_connection(self) -> tuple[bool, str]:
        """For the connection form: reaches the service, and checks the token."""
        try:
            health = _body(self._send(_Call("GET", "/health")))
            self.list_jobs(state="running")
        except MoegenError as error:
            return False, str(error)
        return True, f"moegen {health.get('version', '(unknown version)')} at {self.endpoint.url}"

    def _send(self, call: _Call) -> httpx.Response:
        # A client per call: on_kill runs in a signal handler and must never meet a lock that this thread holds.
        with self.get_conn() as client:
            try:
                return checked(client.request(call.method, call.path, **call.options(self.endpoint)))
            except httpx.HTTPError as error:
                raise _unreachable(self.endpoint, error) from error

    async def _asend(self, call: _Call) -> httpx.Response:
        endpoint = await self.aendpoint()
        async with httpx.AsyncClient(**endpoint.client_options) as client:
            try:
                return checked(await client.request(call.method, call.path, **call.options(endpoint)))
            except httpx.HTTPError as error:
                raise _unreachable(endpoint, error) from error


@dataclass(frozen=True)
class _Call:
    method: str
    path: str
    params: Mapping[str, Any] | None = None
    json: Any = None
    least_timeout_s: float = 0.0  # of a call that may take the service longer than others

    def options(self, endpoint: Endpoint) -> dict[str, Any]:
        """Keyword arguments of httpx's `request`."""
        timeout_s = max(endpoint.request_timeout_s, self.least_timeout_s)
        return {"params": self.params, "json": self.json, "timeout": timeout_s}


def _submit(key: str, spec: Mapping[str, Any], owner: int) -> _Call:
    return _Call("PUT", f"/v1/jobs/{key}", {"owner": owner}, dict(spec))


def _preflight(spec: Mapping[str, Any]) -> _Call:
    return _Call("POST", "/v1/preflight", json=dict(spec), least_timeout_s=120)  # it lists the input's files


def _new_log(key: str, offset: int) -> _Call:
    return _Call("GET", f"/v1/jobs/{key}/logs", {"offset": offset})


def _log(response: httpx.Response) -> tuple[str, int]:
    return response.text, int(response.headers.get("X-Log-Offset", "-1"))


def _list(state: str | None) -> _Call:
    return _Call("GET", "/v1/jobs", {"state": state} if state else None)


def _unreachable(endpoint: Endpoint, error: httpx.HTTPError) -> MoegenUnavailableError:
    why = str(error) or type(error).__name__
    return MoegenUnavailableError(f"no answer from {endpoint.url}: {why}; is `moegen serve` running and reachable?")


def checked(response: httpx.Response) -> httpx.Response:
    """The response, if it is a success; else raises what `MoegenHook` does."""
    if response.is_success:
        return response
    request = response.request
    message = f"{request.method} {request.url}: HTTP {response.status_code}: {_detail(response)}"
    if response.status_code in (401, 403):
        raise MoegenInputError(f"{message}; check the token in the connection's password field")
    if response.status_code == 404 and request.url.path.startswith("/v1/jobs/"):
        raise MoegenJobNotFoundError(message)
    if response.status_code in (408, 425, 429) or response.status_code >= 500:
        raise MoegenUnavailableError(message)
    raise MoegenInputError(message)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase


def _body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise MoegenUnavailableError(f"{response.request.url}: the answer is not JSON from a moegen service")
    return body


def _job(response: httpx.Response) -> Job:
    job = _body(response)
    if not isinstance(job.get("state"), str):
        raise MoegenUnavailableError(f"{response.request.url}: the answer is not a job: it has no state")
    return job


def _jobs(response: httpx.Response) -> list[Job]:
    jobs = _body(response).get("jobs")
    if not isinstance(jobs, list):
        raise MoegenUnavailableError(f"{response.request.url}: the answer is not a list of jobs")
    return jobs

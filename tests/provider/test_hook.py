from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from contextlib import contextmanager

import pytest
from airflow.sdk import Connection
from airflow.sdk.exceptions import AirflowNotFoundException
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from moegen_airflow.endpoint import Endpoint
from moegen_airflow.exceptions import MoegenInputError, MoegenJobNotFoundError, MoegenUnavailableError
from moegen_airflow.hook import MoegenHook
from tests.provider.fake_service import TOKEN

SPEC = {"sampling": {"max_tokens": 4}}


def endpoint(**fields) -> Endpoint:
    connection = Connection(conn_id="c", conn_type="moegen", **fields)
    return Endpoint.from_connection(connection, connection.extra_dejson)


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"host": "http://moegen:8080"}, "http://moegen:8080"),
        ({"host": "https://moegen.example/batch/"}, "https://moegen.example/batch"),
        ({"host": "https://moegen", "port": 8443}, "https://moegen:8443"),
        ({"host": "https://moegen:1", "port": 2}, "https://moegen:1"),
        ({"host": "moegen", "port": 8080}, "http://moegen:8080"),
        ({"host": "moegen", "port": 8443, "schema": "https"}, "https://moegen:8443"),
        ({"host": "moegen"}, "http://moegen"),
    ],
)
def test_url_from_a_connection(fields, url):
    assert endpoint(**fields).url == url


def test_url_from_a_connection_uri():
    connection = Connection.from_uri("moegen://:s%40cret@moegen:8443/https?verify_ssl=false&request_timeout=5", "c")
    read = Endpoint.from_connection(connection, connection.extra_dejson)
    assert (read.url, read.token, read.verify_ssl, read.request_timeout_s) == (
        "https://moegen:8443",
        "s@cret",
        False,
        5,
    )
    assert "s@cret" not in repr(read)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "host is empty"),
        ({"host": "ftp://moegen"}, "ftp://moegen"),
        ({"host": "http://"}, "http"),
        ({"host": "m", "extra": json.dumps({"verify_ssl": "perhaps"})}, "verify_ssl: 'perhaps'"),
        ({"host": "m", "extra": json.dumps({"request_timeout": "soon"})}, "request_timeout: 'soon'"),
        ({"host": "m", "extra": json.dumps({"request_timeout": -1})}, "request_timeout: -1"),
    ],
)
def test_an_unusable_connection_names_the_field(fields, named):
    with pytest.raises(MoegenInputError, match=named):
        endpoint(**fields)


def test_a_missing_ca_file_is_named():
    with pytest.raises(MoegenInputError, match=r"ca_cert: '/nowhere/ca\.pem'"):
        _ = endpoint(host="https://m", extra='{"ca_cert": "/nowhere/ca.pem"}').client_options


def test_the_constructor_does_nothing():
    hook = MoegenHook("no_such_connection")
    with pytest.raises(AirflowNotFoundException):
        _ = hook.endpoint


def test_the_life_of_a_job(fake_service):
    hook = MoegenHook()
    assert hook.submit_job("k", SPEC, owner=1)["state"] == "queued"
    assert hook.submit_job("k", SPEC, owner=2)["owner"] == 2
    assert hook.get_job("k")["key"] == "k"
    assert [job["key"] for job in hook.list_jobs()] == ["k"]
    assert hook.list_jobs(state="running") == []
    assert hook.cancel_job("k", owner=1)["state"] == "queued"  # an older owner
    assert hook.cancel_job("k", owner=2)["state"] == "cancelled"
    assert hook.get_logs("k", tail=7) == "the last 7 lines"
    assert hook.job_url("k") == f"{fake_service.url}/jobs/k"


def test_the_life_of_a_job_asynchronously(fake_service):
    async def life(hook):
        assert (await hook.asubmit_job("k", SPEC, owner=1))["state"] == "queued"
        assert (await hook.aget_job("k"))["key"] == "k"
        assert len(await hook.alist_jobs()) == 1
        assert (await hook.acancel_job("k", owner=1))["state"] == "cancelled"
        assert await hook.aget_logs("k", tail=7) == "the last 7 lines"

    asyncio.run(life(MoegenHook()))


@pytest.mark.parametrize(
    ("reply", "error", "named"),
    [
        (JSONResponse({"detail": "sampling.top_p: 7"}, 422), MoegenInputError, r"HTTP 422: sampling\.top_p: 7"),
        (JSONResponse({"detail": "belongs to another"}, 409), MoegenInputError, "belongs to another"),
        (JSONResponse({"detail": "no"}, 403), MoegenInputError, "check the token"),
        (JSONResponse({"detail": "no job k"}, 404), MoegenJobNotFoundError, "no job k"),
        (JSONResponse({"detail": "starting"}, 503), MoegenUnavailableError, "HTTP 503: starting"),
        (PlainTextResponse("slow down", 429), MoegenUnavailableError, "slow down"),
        (PlainTextResponse("", 502), MoegenUnavailableError, "Bad Gateway"),
        (HTMLResponse("<html>a proxy's page</html>"), MoegenUnavailableError, "not JSON"),
        (JSONResponse(["no", "object"]), MoegenUnavailableError, "not JSON"),
        (JSONResponse({"jobs": []}), MoegenUnavailableError, "not a job"),
        (PlainTextResponse("", 302, {"location": "/login"}), MoegenInputError, "HTTP 302"),
    ],
)
def test_answers_that_are_not_success(fake_service, reply, error, named):
    fake_service.replies = [reply, reply]
    with pytest.raises(error, match=named):
        MoegenHook().get_job("k")
    with pytest.raises(error, match=named):
        asyncio.run(MoegenHook().aget_job("k"))


@contextmanager
def broken_server(behave):
    """Accepts connections and leaves each to `behave`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                behave(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"moegen://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_an_answer(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"state":')
    connection.close()


def test_broken_connections_are_unavailability(monkeypatch):
    open_connections: list[socket.socket] = []
    for behave in (reset, half_an_answer, open_connections.append):  # the last never answers
        with broken_server(behave) as uri:
            monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", f"{uri}?request_timeout=0.3")
            with pytest.raises(MoegenUnavailableError, match="moegen serve"):
                MoegenHook().get_job("k")
            with pytest.raises(MoegenUnavailableError, match="moegen serve"):
                asyncio.run(MoegenHook().aget_job("k"))
    for connection in open_connections:
        connection.close()
    monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", uri)  # nobody listens there any more
    with pytest.raises(MoegenUnavailableError, match="moegen serve"):
        MoegenHook().get_job("k")


def test_connection_test_reaches_the_service_and_checks_the_token(fake_service, monkeypatch):
    assert MoegenHook().test_connection() == (True, f"moegen 9.9 at {fake_service.url}")
    monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", fake_service.connection_uri.replace(TOKEN, "wrong"))
    ok, message = MoegenHook().test_connection()
    assert not ok
    assert "the token is wrong" in message


def test_a_connection_of_a_core_secrets_backend_serves_the_event_loop_too(tmp_path, monkeypatch):
    """`LocalFilesystemBackend` gives core's Connection, which has no coroutine for its extra."""
    from airflow.secrets.local_filesystem import LocalFilesystemBackend

    (tmp_path / "connections.json").write_text(
        json.dumps({"filed": {"conn_type": "moegen", "host": "moegen", "extra": {"request_timeout": 7}}})
    )
    found = LocalFilesystemBackend(connections_file_path=str(tmp_path / "connections.json")).get_connection("filed")

    async def lookup(conn_id):
        return found

    monkeypatch.setattr(MoegenHook, "aget_connection", staticmethod(lookup))
    endpoint = asyncio.run(MoegenHook("filed").aendpoint())
    assert (endpoint.url, endpoint.request_timeout_s) == ("http://moegen", 7.0)

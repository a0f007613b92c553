"""Tables on the web: a server that may be read does not decide what else is read."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from moegen.errors import InputError
from moegen.storage import read_bytes
from table_job import read_all, values

TABLE = b"prompt\na\nb\n"


class _Web(BaseHTTPRequestHandler):
    """`/table.csv` is there; `/moved.csv` and `/away.csv` lead to it, here and on another server."""

    asked: list[str]
    away: str

    def do_GET(self) -> None:
        self.asked.append(self.path)
        found = self.path.startswith("/table.csv")
        self.send_response(200 if found else 302)
        if not found:
            self.send_header("Location", ("" if self.path.startswith("/moved") else self.away) + "/table.csv")
        self.send_header("Content-Length", str(len(TABLE) if found else 0))
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(TABLE)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and what the other one was asked for."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Other", (_Web,), {"asked": asked, "away": ""})) as other:
        away = f"http://127.0.0.1:{other.server_port}"
        with ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (_Web,), {"asked": [], "away": away})) as own:
            for server in (other, own):
                Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{own.server_port}", asked
            own.shutdown()
            other.shutdown()


def test_redirects_within_a_host_are_followed_and_to_another_are_not(web: tuple[str, list[str]]) -> None:
    address, asked_elsewhere = web
    for name in ("table.csv", "moved.csv"):
        assert values(read_all(f"{address}/{name}", ["prompt"])) == [{"prompt": "a"}, {"prompt": "b"}]
    for read in (lambda uri: read_all(uri, ["prompt"]), read_bytes):
        with pytest.raises(
            InputError, match=r"away\.csv: redirects to 127\.0\.0\.1, another host, .* give the address"
        ):
            read(f"{address}/away.csv?signature=secret")
    assert asked_elsewhere == []

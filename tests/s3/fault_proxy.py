"""An HTTP/1.1 proxy before an S3 server that spoils some of the requests: the same ones, if the order is the same.

    python -m tests.s3.fault_proxy http://127.0.0.1:9000 [--share 0.05] [--seed 1] [--unconditional]

Requests keep the `Host` that they were signed for, so the server must not care for its own name. Without conditional
writes they are signed anew, as `If-None-Match` is part of what was signed: with `AWS_ACCESS_KEY_ID` and so on.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

Headers = list[tuple[str, str]]

ERROR = "500"  # the server is never asked
SLOW_DOWN = "503"
RESET = "reset"
LOST_ANSWER = "lost answer"  # the server has done it, but the client never hears of it
SLOW_BODY = "slow body"
TRUNCATED_BODY = "truncated body"
FAULTS = (ERROR, SLOW_DOWN, RESET, LOST_ANSWER, SLOW_BODY, TRUNCATED_BODY)
_SLOW_PIECES, _SLOW_PAUSE_S = 10, 0.03
_NO_BODY = {204, 304}


@dataclass(frozen=True)
class Message:
    """A request or an answer: its first line, its headers, its whole body."""

    start: str
    headers: Headers
    body: bytes

    @property
    def method(self) -> str:
        return self.start.split()[0]

    def encoded(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


@dataclass
class FaultProxy:
    """Listens on a free port of the loopback address, in a thread of its own, while its `with` block lasts.

    Args:
        server: `http://host:port`.
        share: of the requests that are spoilt.
        seed: of the choice.
        faults: what can happen to them, equally likely.
        unconditional: `If-None-Match` is taken from every request, as if the server did not know it.
    """

    server: str
    share: float = 0.05
    seed: int = 1
    faults: tuple[str, ...] = FAULTS
    unconditional: bool = False
    counts: Counter[str] = field(default_factory=Counter)  # by fault; "" is none

    def __post_init__(self) -> None:
        host, _, port = self.server.removeprefix("http://").rpartition(":")
        self._host, self._port = host, int(port)
        self._random = random.Random(self.seed)
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._up.set()
        await self._stop.wait()
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._talk(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection: request after request, until either side has had enough."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                async with self._upstream() as (server_reader, server_writer):
                    while (request := await _read(reader, writer)) is not None:
                        answer, fault = await self._answer(request, server_reader, server_writer)
                        if not await _send(answer, fault, writer):
                            return
            finally:
                writer.close()

    @asynccontextmanager
    async def _upstream(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def _answer(
        self, request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[Message | None, str]:
        fault = self._random.choice(self.faults) if self._random.random() < self.share else ""
        self.counts[fault] += 1
        if fault in (ERROR, SLOW_DOWN):
            return _refusal(fault), fault
        if fault == RESET:
            return None, fault
        writer.write((_without_condition(request) if self.unconditional else request).encoded())
        await writer.drain()
        answer = await _read(reader, None, to=request.method)
        return (None if fault == LOST_ANSWER else answer), fault


def _without_condition(request: Message) -> Message:
    if "if-none-match" not in (name.lower() for name, _ in request.headers):
        return request
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.session import Session

    gone = ("if-none-match", "authorization", "x-amz-date", "x-amz-content-sha256")
    kept = {name: value for name, value in request.headers if name.lower() not in gone}
    method, path, _ = request.start.split()
    signed = AWSRequest(method, f"http://{kept['Host']}{path}", kept, request.body)
    session = Session()
    S3SigV4Auth(session.get_credentials(), "s3", session.get_config_variable("region")).add_auth(signed)
    return Message(request.start, list(signed.headers.items()), request.body)


def _refusal(status: str) -> Message:
    code = "InternalError" if status == ERROR else "SlowDown"
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>spoilt on purpose</Message></Error>".encode()
    return Message(
        f"HTTP/1.1 {status} Spoilt", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body
    )


async def _send(answer: Message | None, fault: str, writer: asyncio.StreamWriter) -> bool:
    """Whether the connection can be used again."""
    if answer is None:
        writer.transport.abort()  # a reset, not an end
        return False
    data = answer.encoded()
    if fault == TRUNCATED_BODY and answer.body:
        writer.write(data[: len(data) - len(answer.body) + len(answer.body) // 2])
        await writer.drain()
        writer.write_eof()
        return False
    pieces = _SLOW_PIECES if fault == SLOW_BODY else 1
    size = -(-len(data) // pieces)
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        await writer.drain()
        await asyncio.sleep(_SLOW_PAUSE_S if pieces > 1 else 0)
    return True


async def _read(
    reader: asyncio.StreamReader, asker: asyncio.StreamWriter | None, to: str | None = None
) -> Message | None:
    """The next message; None where the other side has closed. `to`: the method that an answer answers."""
    start = await reader.readline()
    if not start:
        return None
    headers: Headers = []
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name.strip(), value.strip()))
    values = {name.lower(): value for name, value in headers}
    if asker is not None and values.get("expect", "").lower() == "100-continue":
        asker.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        headers = [pair for pair in headers if pair[0].lower() != "expect"]
    start_line = start.decode("latin-1").strip()
    if to == "HEAD" or (to and int(start_line.split()[1]) in _NO_BODY):
        return Message(start_line, headers, b"")
    if values.get("transfer-encoding", "").lower() == "chunked":
        body = await _read_chunks(reader)
        headers = [pair for pair in headers if pair[0].lower() != "transfer-encoding"]
        return Message(start_line, [*headers, ("Content-Length", str(len(body)))], body)
    return Message(start_line, headers, await reader.readexactly(int(values.get("content-length", 0))))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    while (await reader.readline()) not in (b"\r\n", b""):
        pass
    return body


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unconditional", action="store_true")
    args = parser.parse_args()
    with FaultProxy(args.server, args.share, args.seed, unconditional=args.unconditional) as proxy:
        print(proxy.endpoint, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        print(dict(proxy.counts))

"""Text tables: opening them, plain or gzipped, and cutting their records into chunks."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, TypeVar, cast

from moegen.errors import InputError
from moegen.storage import open_input
from moegen.table.source import CHUNK_BYTES, CHUNK_ROWS
from moegen.units import MIB

_Record = TypeVar("_Record")


@contextmanager
def open_text(uri: str) -> Iterator[BinaryIO]:
    """The bytes of a UTF-8 text file, without byte order mark, unpacked when the name ends in `.gz`.

    Raises:
        InputError: not found, or UTF-16.
        StorageError: storage refused.
    """
    with open_input(uri, "sequential") as stored:
        raw = gzip.GzipFile(fileobj=stored) if uri.lower().endswith(".gz") else stored
        with io.BufferedReader(cast(io.RawIOBase, raw), MIB) as file:
            mark = file.peek(3)
            if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{uri}: is UTF-16; write it as UTF-8")
            if mark.startswith(b"\xef\xbb\xbf"):
                file.read(3)
            yield cast(BinaryIO, file)


def cut(records: Iterable[_Record], size: Callable[[_Record], int]) -> Iterator[list[_Record]]:
    """Lists of at most `CHUNK_ROWS` records, ended early by the record that reaches `CHUNK_BYTES`."""
    chunk: list[_Record] = []
    chunk_bytes = 0
    for record in records:
        chunk.append(record)
        chunk_bytes += size(record)
        if len(chunk) == CHUNK_ROWS or chunk_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk

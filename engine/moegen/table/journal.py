"""`_batch/<job key>/journal/`: finished rows whose parts are not complete yet, so that a crash does not cost them.

A journal file has a row's index and its result as JSON, whose fields are those of `RowResult`: what the job's columns
make of them is settled when the part is written, as for every other row.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa

from moegen.errors import InputError, MoegenError
from moegen.row import RowError, RowResult, Status
from moegen.storage import join, list_names, put_create, read_bytes, remove

_NAME = re.compile(r"\d{6,}-\d{6,}\.arrow")
_FINGERPRINT_KEY = b"moegen.fingerprint"
_FIELDS = [field.name for field in fields(RowResult)]
_SCHEMA = pa.schema([("row_index", pa.int64()), ("result", pa.string())])

log = logging.getLogger(__name__)


class Journal:
    """The journal of one job, as one holder of its lease goes on with it. `read` comes first.

    Files are small, named by the holder's epoch and their number, and created at once or not at all. A file goes when
    all its rows are in committed parts.

    Args:
        folder: the job's own, see `batch_folder`.
        epoch: of the lease.
        fingerprint: of the work.
        rows_per_part, first_row: which rows make a part; parts are counted from the first row.
    """

    def __init__(self, folder: str, epoch: int, fingerprint: str, rows_per_part: int, first_row: int = 0) -> None:
        self._folder = join(folder, "journal")
        self._epoch, self._rows_per_part = epoch, rows_per_part
        self._first_row = first_row
        self._schema = _SCHEMA.with_metadata({_FINGERPRINT_KEY: fingerprint.encode()})
        self._files: dict[str, Counter[int]] = {}  # name -> part -> rows
        self._written = 0

    def read(self, is_committed: Callable[[int, int], bool]) -> dict[int, RowResult]:
        """Row index -> result of the rows that no part has; a file that is damaged is told and passed over.

        Raises:
            StorageError: storage refused.
        """
        found: dict[int, RowResult] = {}
        for name in filter(_NAME.fullmatch, list_names(self._folder)):
            results = self._results(name)
            self._files[name] = self._parts_of(results)
            found.update((result.row_index, result) for result in results if not is_committed(result.row_index, 1))
        return found

    def write(self, results: Sequence[RowResult]) -> None:
        """One more file.

        Raises:
            MoegenError: a file of that name has other content, which the lease should have made impossible.
            StorageError: storage refused.
        """
        name = f"{self._epoch:06d}-{self._written:06d}.arrow"
        uri, data = join(self._folder, name), self._encode(results)
        if not put_create(uri, data):
            raise MoegenError(f"{uri}: is there already with other rows; no two runners may have one lease")
        self._written += 1
        self._files[name] = self._parts_of(results)

    def prune(self, is_committed: Callable[[int, int], bool]) -> None:
        """Removes the files that nobody needs any more. Raises `StorageError` when storage refuses."""
        for name, parts in list(self._files.items()):
            if all(self._has(part, is_committed) for part in parts):
                remove(join(self._folder, name))
                del self._files[name]

    def rows(self, is_committed: Callable[[int, int], bool]) -> int:
        """How many rows only the journal has."""
        return sum(
            rows
            for parts in list(self._files.values())
            for part, rows in parts.items()
            if not self._has(part, is_committed)
        )

    def _has(self, part: int, is_committed: Callable[[int, int], bool]) -> bool:
        return is_committed(self._first_row + part * self._rows_per_part, 1)

    def _parts_of(self, results: Sequence[RowResult]) -> Counter[int]:
        return Counter((result.row_index - self._first_row) // self._rows_per_part for result in results)

    def _encode(self, results: Sequence[RowResult]) -> bytes:
        rows, texts = [result.row_index for result in results], [encode_result(result) for result in results]
        columns = [pa.array(rows), pa.array(texts)]
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, self._schema, options=options) as writer:
            writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        return sink.getvalue()

    def _results(self, name: str) -> list[RowResult]:
        uri = join(self._folder, name)
        try:
            return list(self._decode(read_bytes(uri)))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, InputError) as error:
            reason = str(error).partition("\n")[0]
            log.warning("%s: is no journal of this work, its rows are run again: %s", uri, reason)
            return []

    def _decode(self, data: bytes) -> Iterator[RowResult]:
        with pa.ipc.open_file(pa.py_buffer(data)) as file:
            if not file.schema.equals(self._schema, check_metadata=True):
                raise ValueError("it has other columns, or is of other work")
            table = file.read_all()
        table.validate(full=True)
        yield from (decode_result(text) for text in table["result"].to_pylist())


def encode_result(result: RowResult) -> str:
    """As JSON."""
    return json.dumps({name: getattr(result, name) for name in _FIELDS}, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON lacks: an error, and NumPy's numbers."""
    return asdict(value) if isinstance(value, RowError) else value.item()


def decode_result(text: str) -> RowResult:
    """What `encode_result` made it of."""
    values: dict[str, Any] = json.loads(text)
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    error = RowError(**values["error"]) if values["error"] is not None else None
    return RowResult(**{**values, "status": Status(values["status"]), "error": error})

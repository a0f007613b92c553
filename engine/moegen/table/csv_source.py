"""CSV: a header, then rows of text; a row of another length than the header is a row with an error."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from moegen.errors import InputError
from moegen.row import RowError
from moegen.table.filter import Bounds
from moegen.table.source import Chunk, View, Wanted, reading
from moegen.table.text_file import cut, open_text

_FIELD_CHARACTERS = 1 << 28  # the csv module's own limit of 131,072 is below one long prompt


@dataclass(frozen=True)
class _Record:
    line: int  # number of its last line, from 1
    cells: list[str]
    problem: str | None


class CsvSource:
    """A CSV file as RFC 4180 has it: commas, double quotes, UTF-8, a header line.

    Every column is a string column, so that identifiers like 007 survive. An empty field is null, since CSV has no
    other way to write one. A row that is too short or too long, or not valid CSV, is a row with the error
    `malformed_row`: missing cells null, surplus ones dropped. Bytes that are not UTF-8 become U+FFFD and the row
    gets the error `invalid_utf8`. Blank lines are no rows.
    """

    def __init__(self, uri: str, limit: int | None) -> None:
        self.uri = uri
        self.rows = 0
        records = self._records()
        header = next(records, None)
        if header is None or header.problem is not None:
            raise InputError(f"{uri}: has no header line; the first line of a CSV file must name its columns")
        self.schema = pa.schema([(name, pa.string()) for name in _names(uri, header)])
        self.rows = sum(1 for _ in islice(records, limit))

    def _records(self) -> Iterator[_Record]:
        csv.field_size_limit(_FIELD_CHARACTERS)
        with reading(self.uri), open_text(self.uri) as file:
            lines = csv.reader(io.TextIOWrapper(file, "utf-8", "surrogateescape", newline=""), strict=True)
            while True:
                try:
                    cells = next(lines)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield _Record(lines.line_num, [], str(error))
                else:
                    if cells:
                        yield _Record(lines.line_num, cells, None)

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """See `Source`."""
        first_row = 0
        for records in cut(islice(self._records(), 1, rows + 1), lambda record: sum(map(len, record.cells))):
            if wanted(first_row, len(records)):
                yield self._chunk(first_row, records, view)
            first_row += len(records)

    def bounds(self, first_row: int, names: Sequence[str]) -> dict[str, Bounds]:
        """Nothing: see `Source`."""
        return {}

    def _chunk(self, first_row: int, records: Sequence[_Record], view: View) -> Chunk:
        names = self.schema.names
        seen = {*view.carried.names, *view.needed}
        rows = [dict(zip(names, (cell or None for cell in record.cells), strict=False)) for record in records]
        values = [
            _problem(record, len(names), [cell for name, cell in row.items() if name in seen])
            or {name: row[name] for name in view.needed}
            for record, row in zip(records, rows, strict=True)
        ]
        columns = [pa.array([_utf8(row.get(field.name)) for row in rows], field.type) for field in view.carried]
        return Chunk(first_row, pa.Table.from_arrays(columns, schema=view.carried), values)


def _names(uri: str, header: _Record) -> list[str]:
    names = [_utf8(cell) or "" for cell in header.cells]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{uri}: the header names the column {twice!r} twice; give each column its own name")
    return names


def _problem(record: _Record, width: int, cells: Sequence[str | None]) -> RowError | None:
    if record.problem is not None:
        return RowError("malformed_row", f"line {record.line}: {record.problem}", "read")
    if len(record.cells) != width:
        message = f"line {record.line}: {len(record.cells)} fields where the header has {width}"
        return RowError("malformed_row", message, "read")
    if any(_utf8(cell) != cell for cell in cells):
        return RowError("invalid_utf8", f"line {record.line}: holds bytes that are not UTF-8", "read")
    return None


def _utf8(cell: str | None) -> str | None:
    """The text with U+FFFD for each undecodable piece, which `surrogateescape` has marked."""
    if cell is None or cell.isascii():
        return cell
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

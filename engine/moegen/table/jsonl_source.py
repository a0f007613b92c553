"""JSON lines: one object per line; a line that is not one is a row with an error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from moegen.row import RowError
from moegen.table.filter import Bounds
from moegen.table.schema import valid_utf8
from moegen.table.source import Chunk, View, Wanted, reading
from moegen.table.text_file import cut, open_text

# The kinds of value that a column holds (beside null) -> its type. Any other mixture is JSON text.
_TYPES: dict[frozenset[str], pa.DataType] = {
    frozenset({"bool"}): pa.bool_(),
    frozenset({"int"}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
}
_INT64 = range(-(1 << 63), 1 << 63)
_Kinds = dict[str, set[str]]  # column -> the kinds of its values


@dataclass(frozen=True)
class Line:
    """One line of a file that is not blank."""

    number: int  # from 1, blank lines counted
    data: bytes


class JsonlSource:
    """A JSONL file. The whole of it is scanned once, for its row count and its columns' types.

    A column of true/false, of integers (64 bit), of numbers or of strings has that type. Any other column is a
    string column: strings as they are, everything else as JSON text. A lone surrogate, which JSON allows, stays in
    a row's values and is U+FFFD in the carried column.
    """

    def __init__(self, uri: str, limit: int | None) -> None:
        self.uri = uri
        self.rows = 0
        self.kinds: _Kinds = {}
        for line in islice(lines_of(uri), limit):
            self.rows += 1
            row = parsed_line(line)
            for name, value in row.items() if isinstance(row, dict) else ():
                self.kinds.setdefault(valid_utf8(name), set()).add(_kind(value))
        self.schema = _schema(self.kinds)

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """See `Source`."""
        first_row = 0
        for lines in cut(islice(lines_of(self.uri), rows), lambda line: len(line.data)):
            if wanted(first_row, len(lines)):
                yield _chunk(first_row, lines, view)
            first_row += len(lines)

    def bounds(self, first_row: int, names: Sequence[str]) -> dict[str, Bounds]:
        """Nothing: see `Source`."""
        return {}


def lines_of(uri: str) -> Iterator[Line]:
    """The lines of a file that are not blank. Raises as `reading`."""
    with reading(uri), open_text(uri) as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                yield Line(number, data)


def share_types(sources: Sequence[JsonlSource]) -> None:
    """Gives files the types that their rows would have in one file."""
    kinds: _Kinds = {}
    for source in sources:
        for name, found in source.kinds.items():
            kinds.setdefault(name, set()).update(found)
    for source in sources:
        source.schema = _schema(kinds)


def _schema(kinds: _Kinds) -> pa.Schema:
    return pa.schema([(name, _TYPES.get(frozenset(found - {"null"}), pa.string())) for name, found in kinds.items()])


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if value in _INT64 else "big int"
    return "null" if value is None else type(value).__name__


def parsed_line(line: Line) -> dict[str, Any] | RowError:
    """The object that the line is, or why it is none."""
    try:
        row = json.loads(line.data.decode())
    except UnicodeDecodeError as error:
        message = f"line {line.number}: byte {error.start + 1} is not UTF-8"
        return RowError("invalid_utf8", message, "read")
    except json.JSONDecodeError as error:
        return _malformed(line, f"{error.msg} at character {error.colno}")
    except ValueError:
        return _malformed(line, "an integer with too many digits")
    except RecursionError:
        return _malformed(line, "nested too deeply")
    return row if isinstance(row, dict) else _malformed(line, f"a JSON object was expected, not {type(row).__name__}")


def _malformed(line: Line, what: str) -> RowError:
    return RowError("malformed_json", f"line {line.number}: {what}", "read")


def _chunk(first_row: int, lines: Sequence[Line], view: View) -> Chunk:
    parsed = [parsed_line(line) for line in lines]
    rows = [{} if isinstance(row, RowError) else row for row in parsed]
    columns = [
        pa.array([_carry(row.get(field.name), field.type) for row in rows], field.type) for field in view.carried
    ]
    values = [row if isinstance(row, RowError) else {name: row.get(name) for name in view.needed} for row in parsed]
    return Chunk(first_row, pa.Table.from_arrays(columns, schema=view.carried), values)


def _carry(value: Any, type_: pa.DataType) -> Any:
    if value is None or pa.types.is_boolean(type_) or pa.types.is_integer(type_):
        return value
    if pa.types.is_floating(type_):
        return float(value)
    return valid_utf8(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

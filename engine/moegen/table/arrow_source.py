"""Parquet and Arrow files: columns with types, read in bounded memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moegen.errors import InputError
from moegen.row import RowError
from moegen.storage import BLOCK_BYTES, open_input
from moegen.table.filter import Bounds
from moegen.table.source import CHUNK_BYTES, CHUNK_ROWS, Chunk, Values, View, Wanted, reading


class ParquetSource:
    """A Parquet file, read column chunk by column chunk through a small buffer.

    Row groups that nobody wants are not fetched.
    """

    def __init__(self, uri: str, limit: int | None) -> None:
        self.uri = uri
        with self._file() as file:
            self._metadata = file.metadata
            self.schema = _table_schema(uri, file.schema_arrow)
        self.rows = self._metadata.num_rows
        sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)][:-1]

    @contextmanager
    def _file(self, metadata: Any = None) -> Iterator[Any]:
        # pyarrow.dataset and pre_buffer hold whole column chunks; this holds BLOCK_BYTES of each.
        with reading(self.uri), closing(open_input(self.uri, "random")) as stored:
            yield pq.ParquetFile(stored, metadata=metadata, pre_buffer=False, buffer_size=BLOCK_BYTES)

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """See `Source`."""
        columns = _projection(self.schema, view)
        with self._file(self._metadata) as file:
            first_row = 0
            for index in range(self._metadata.num_row_groups):
                group_rows = min(self._metadata.row_group(index).num_rows, rows - first_row)
                if group_rows > 0 and wanted(first_row, group_rows):
                    batches = file.iter_batches(self._batch_rows(index, columns), row_groups=[index], columns=columns)
                    yield from _chunks(batches, first_row, first_row + group_rows, view, wanted)
                first_row += group_rows

    def bounds(self, first_row: int, names: Sequence[str]) -> dict[str, Bounds]:
        """See `Source`: what the row group's statistics say."""
        group = self._metadata.row_group(bisect_right(self._starts, first_row) - 1)
        types = {name: self.schema.field(name).type for name in names if name in self.schema.names}
        # A dot may be part of a name, or lead into a struct.
        flat = {name: type_ for name, type_ in types.items() if not (pa.types.is_nested(type_) or "." in name)}
        chunks = (group.column(i) for i in range(group.num_columns))
        return {
            chunk.path_in_schema: _bounds(chunk, flat[chunk.path_in_schema])
            for chunk in chunks
            if chunk.path_in_schema in flat
        }

    def _batch_rows(self, index: int, columns: list[str]) -> int:
        """As many rows as make about `CHUNK_BYTES` in these columns."""
        group = self._metadata.row_group(index)
        chunks = (group.column(i) for i in range(group.num_columns))
        wanted = set(columns)  # by the first name of a nested path; flat columns may have dots in theirs
        size = sum(
            c.total_uncompressed_size
            for c in chunks
            if c.path_in_schema in wanted or c.path_in_schema.partition(".")[0] in wanted
        )
        return max(1, min(CHUNK_ROWS, CHUNK_BYTES * group.num_rows // max(size, 1)))


class ArrowSource:
    """An Arrow IPC file (also called Feather v2) or stream; its largest record batch must fit in memory."""

    def __init__(self, uri: str, limit: int | None) -> None:
        self.uri = uri
        with self._reader() as reader:
            self.schema = _table_schema(uri, reader.schema)
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                self.rows = reader.count_rows()
            else:
                self.rows = sum(batch.num_rows for batch in reader)

    @contextmanager
    def _reader(self, columns: Sequence[str] = ()) -> Iterator[Any]:
        with reading(self.uri), closing(open_input(self.uri, "sequential")) as stored:
            magic = stored.read(6)
            stored.seek(0)
            if magic.startswith(b"FEA1"):
                raise InputError(f"{self.uri}: is Feather version 1, which lacks types; write it again as version 2")
            included = [self.schema.get_field_index(name) for name in columns]
            options = pa.ipc.IpcReadOptions(included_fields=included)  # empty: all
            opener = pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream
            yield opener(stored, options=options)

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """See `Source`."""
        with self._reader(_projection(self.schema, view)) as reader:
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(reader)
            yield from _chunks(batches, 0, rows, view, wanted)

    def bounds(self, first_row: int, names: Sequence[str]) -> dict[str, Bounds]:
        """Nothing: see `Source`."""
        return {}


def _bounds(chunk: Any, type_: pa.DataType) -> Bounds:
    """What the statistics of a row group's column say."""
    statistics = chunk.statistics
    if statistics is None:
        return Bounds(None, None)
    counted = statistics.has_null_count
    nulls, values = not counted or statistics.null_count > 0, not counted or statistics.null_count < chunk.num_values
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    try:
        if statistics.has_min_max:
            return Bounds(pa.scalar(statistics.min, type_), pa.scalar(statistics.max, type_), nulls, values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):  # a value that Python lacks
        pass
    return Bounds(None, None, nulls, values)


def _table_schema(uri: str, schema: pa.Schema) -> pa.Schema:
    twice = next((name for name, count in Counter(schema.names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{uri}: has two columns named {twice!r}; give each column its own name")
    return schema.remove_metadata()


def _projection(schema: pa.Schema, view: View) -> list[str]:
    wanted = {*view.carried.names, *view.needed}
    return [name for name in schema.names if name in wanted]


def _chunks(batches: Iterable[Any], first_row: int, stop: int, view: View, wanted: Wanted) -> Iterator[Chunk]:
    """Record batches that begin at `first_row` as chunks, up to the row `stop`."""
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK_ROWS):
            piece = batch.slice(start, min(CHUNK_ROWS, stop - first_row))
            if piece.num_rows == 0:
                return
            if wanted(first_row, piece.num_rows):
                yield Chunk(first_row, _carried(piece, view.carried), _values(piece, view.needed))
            first_row += piece.num_rows


def _carried(piece: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    columns = []
    own = dict(zip(piece.schema.names, piece.columns, strict=True))
    for field in schema:
        column = own.get(field.name)
        missing = column is None or column.type != field.type  # absent, or of type null
        columns.append(pa.nulls(piece.num_rows, field.type) if missing else column)
    return pa.Table.from_arrays(columns, schema=schema)


def _values(piece: pa.RecordBatch, needed: Sequence[str]) -> list[Values]:
    columns = [to_python(piece.column(name), name) for name in needed]
    rows = ([column[i] for column in columns] for i in range(piece.num_rows))
    return [_row_error(cells) or dict(zip(needed, cells, strict=True)) for cells in rows]


def _row_error(cells: Sequence[Any]) -> RowError | None:
    return next((cell for cell in cells if isinstance(cell, RowError)), None)


def to_python(column: pa.Array | pa.ChunkedArray, name: str) -> list[Any]:
    """The column's values as plain Python; a `RowError` where there is no such value."""
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError):
        return [_python_cell(cell, name) for cell in column]


def _python_cell(cell: pa.Scalar, name: str) -> Any:
    try:
        return cell.as_py(maps_as_pydicts="strict")
    except UnicodeDecodeError:
        return RowError("invalid_utf8", f"column {name!r} holds bytes that are not UTF-8", "read")
    except KeyError:
        return RowError("duplicate_key", f"column {name!r} holds a map that has a key twice", "read")
    except (ValueError, OverflowError) as error:
        return RowError("unreadable_value", f"column {name!r} holds a value that Python lacks: {error}", "read")

"""The input table: any number of files of any known format, read as one stream of row batches."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from moegen.errors import InputError, SpecError
from moegen.spec import Input
from moegen.storage import StoredObject, describe, list_files
from moegen.table.arrow_source import ArrowSource, ParquetSource
from moegen.table.csv_source import CsvSource
from moegen.table.jsonl_source import JsonlSource, share_types
from moegen.table.source import Source, Values, View, Wanted

_DESCRIBED_AT_ONCE = 16  # requests in flight, where storage is far away
_SOURCES: dict[str, Callable[[str, int | None], Source]] = {
    "parquet": ParquetSource,
    "arrow": ArrowSource,
    "csv": CsvSource,
    "jsonl": JsonlSource,
}
_ENDINGS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
}


@dataclass(frozen=True)
class InputFile:
    """One input file as it was when the reader was made. `rows`: how many of its rows belong to the table."""

    uri: str
    size_bytes: int
    version: str
    rows: int


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one file; at most 1,024."""

    first_row: int  # row_index of the first row, counted over all input files in sorted order
    carried: pa.Table  # the columns carried to the output, unchanged, in the reader's schema
    file: str  # value of the input_file column
    values: list[Values]  # per row: plain Python values of the needed columns, or why the row cannot be read

    @property
    def rows(self) -> int:
        return len(self.values)


def _everything(first_row: int, rows: int) -> bool:
    return True


class TableReader:
    """Finds the input files, counts their rows and settles the schema; `batches` then streams the rows.

    Columns that only some files have are null in the others; a column's type must agree wherever it occurs.
    With `input.limit`, files after the last row are neither opened nor listed.

    Raises:
        SpecError: a column that does not exist, an unknown format or scheme.
        InputError: no files, a damaged or empty-headed file, files whose schemas do not agree.
        StorageError: storage refused.
    """

    files: tuple[InputFile, ...]
    schema: pa.Schema  # of the carried columns
    rows: int  # after the limit

    def __init__(self, spec: Input, needed: Sequence[str]) -> None:
        self._sources, self.files = _open_files(spec)
        share_types([source for source in self._sources if isinstance(source, JsonlSource)])
        table_schema = _unify(self._sources)
        self.rows = sum(file.rows for file in self.files)
        self.schema = _select(table_schema, spec, needed, may_be_unknown=_shows_no_columns(self._sources))
        for source in self._sources:
            _check_needed(source, needed)
        self._view = View(self.schema, tuple(needed))

    def batches(self, wanted: Wanted = _everything) -> Iterator[RowBatch]:
        """All rows in order, without the batches for which `wanted(first_row, rows)` is false.

        Which rows make a batch does not depend on `wanted`, nor does a row's index.

        Raises:
            InputError: a file was changed since the reader was made, or is damaged.
            StorageError: storage refused.
        """
        file_first = 0
        for source, file in zip(self._sources, self.files, strict=True):
            _check_unchanged(file)
            for chunk in source.chunks(self._view, file.rows, _shifted(wanted, file_first)):
                yield RowBatch(file_first + chunk.first_row, chunk.carried, file.uri, chunk.values)
            file_first += file.rows


def _shifted(wanted: Wanted, by: int) -> Wanted:
    return lambda first_row, rows: wanted(first_row + by, rows)


def input_objects(spec: Input) -> tuple[StoredObject, ...]:
    """The files that the input names, as storage describes them; none is opened. Raises as `TableReader`."""
    with ThreadPoolExecutor(_DESCRIBED_AT_ONCE, thread_name_prefix="objects") as pool:
        return tuple(pool.map(describe, _find(spec)))


def _open_files(spec: Input) -> tuple[list[Source], tuple[InputFile, ...]]:
    sources: list[Source] = []
    files: list[InputFile] = []
    left = spec.limit
    for uri in _find(spec):
        if left is not None and left <= 0 and files:
            break
        stored = describe(uri)
        source = _SOURCES[_format(uri, spec)](uri, left)
        rows = source.rows if left is None else min(left, source.rows)
        left = None if left is None else left - rows
        sources.append(source)
        files.append(InputFile(uri, stored.size_bytes, stored.version, rows))
    return sources, tuple(files)


def _find(spec: Input) -> list[str]:
    def is_data(path: str) -> bool:
        return spec.format != "auto" or _by_ending(path) is not None

    found = sorted({file for uri in spec.uris for file in list_files(uri, is_data)})
    if not found:
        endings = "" if spec.format != "auto" else f" with an ending of {', '.join(_ENDINGS)}"
        raise InputError(
            f"input.uri: no files{endings} at {', '.join(spec.uris)}; names that begin with _ or . do not count"
        )
    return found


def _by_ending(path: str) -> str | None:
    return next((kind for ending, kind in _ENDINGS.items() if path.lower().endswith(ending)), None)


def _format(uri: str, spec: Input) -> str:
    kind = _by_ending(uri) if spec.format == "auto" else spec.format
    if kind is None:
        raise SpecError(f"input.format: {uri} has none of the endings {', '.join(_ENDINGS)}; set input.format")
    return kind


def _check_unchanged(file: InputFile) -> None:
    now = describe(file.uri)
    if (now.size_bytes, now.version) != (file.size_bytes, file.version):
        raise InputError(f"{file.uri}: changed since the job began; start the job again when it is complete")


def _unify(sources: Sequence[Source]) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    for source in sources:
        for field in source.schema:
            known = fields.setdefault(field.name, field)
            if known.type != field.type and not pa.types.is_null(field.type):
                if not pa.types.is_null(known.type):
                    raise InputError(
                        f"{source.uri}: column {field.name!r} is {field.type}, but {known.type} in an earlier file;"
                        " write both with one type, leave the column out with input.columns, or use two jobs"
                    )
                fields[field.name] = field
    return pa.schema([field.with_nullable(True) for field in fields.values()] if len(sources) > 1 else fields.values())


def _select(table: pa.Schema, spec: Input, needed: Sequence[str], *, may_be_unknown: bool) -> pa.Schema:
    carried = table.names if spec.columns is None else spec.columns
    asked = [("input.columns", name) for name in carried] + [("prompt and sampling", name) for name in needed]
    if spec.id_column is not None:
        asked.append(("input.id_column", spec.id_column))
    for where, name in asked:
        if name not in table.names and not may_be_unknown:
            raise SpecError(f"{where}: the input has no column {name!r}; {_hint(name, table.names)}")
    if len(set(carried)) < len(carried):
        raise SpecError(f"input.columns: {list(carried)} names a column twice; name each once")
    return pa.schema([table.field(name) if name in table.names else pa.field(name, pa.string()) for name in carried])


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return f"{guess}its columns are {', '.join(map(repr, names[:30])) or 'none'}{more}"


def _shows_no_columns(sources: Sequence[Source]) -> bool:
    """JSONL without a single readable object says nothing about its columns, so none can be called missing."""
    return all(isinstance(source, JsonlSource) and not source.schema for source in sources)


def _check_needed(source: Source, needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in source.schema.names]
    if missing and not isinstance(source, JsonlSource):
        raise InputError(f"{source.uri}: has no column {missing[0]!r}, which the job needs and other files have")

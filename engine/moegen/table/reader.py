"""The input table: any number of files of any known format, read as one stream of row batches."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa

from moegen.condition import Condition, parse
from moegen.errors import InputError, SpecError
from moegen.spec import Input
from moegen.storage import StoredObject, describe, list_files, public, search_root
from moegen.table.arrow_source import ArrowSource, ParquetSource
from moegen.table.csv_source import CsvSource
from moegen.table.filter import Bounds, Filter
from moegen.table.jsonl_source import JsonlSource, share_types
from moegen.table.member import Member
from moegen.table.openai_source import OpenAiSource
from moegen.table.partitions import names_in, scalars, types_of
from moegen.table.source import Source, Values, View, Wanted

_FILES_AT_ONCE = 8  # opened, where storage is far away
_DESCRIBED_AT_ONCE = 16  # requests in flight, where storage is far away
_SOURCES: dict[str, Callable[[str, int | None], Source]] = {
    "parquet": ParquetSource,
    "arrow": ArrowSource,
    "csv": CsvSource,
    "jsonl": JsonlSource,
    "openai_jsonl": OpenAiSource,
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
    """Finds the input files, counts the rows that belong to the table and settles its schema; `batches` streams them.

    Columns that only some files have are null in the others; a column's type must agree wherever it occurs. The table
    is what `input.filter` lets pass, of that the first `input.limit` rows, of those the shard's. With a limit and no
    filter, files after the last row are neither opened nor listed; with a filter, those are not that its columns of
    the path rule out.

    Raises:
        SpecError: a column that does not exist, a filter that does not fit them, an unknown format or scheme.
        InputError: no files, a damaged or empty-headed file, files whose schemas do not agree.
        StorageError: storage refused.
    """

    files: tuple[InputFile, ...]
    schema: pa.Schema  # of the carried columns
    first_row: int  # row_index of the first row: 0 but for shards
    rows: int  # after filter, limit and shard

    def __init__(self, spec: Input, needed: Sequence[str]) -> None:
        condition = None if spec.filter is None else parse(spec.filter)
        self._members = _open_files(spec, condition)
        sources = [member.source for member in self._members]
        share_types([source for source in sources if isinstance(source, JsonlSource)])
        table_schema = _unify(self._members)
        unknown = _shows_no_columns(sources)
        self.schema = _select(table_schema, spec, needed, may_be_unknown=unknown)
        for member in self._members:
            _check_needed(member, needed)
        if condition is not None and not unknown:
            _select_rows(self._members, Filter(condition, table_schema), table_schema, spec.limit)
        self.first_row, stop = _extent(sum(member.rows for member in self._members), spec)
        self.rows = stop - self.first_row
        self._starts = [0, *accumulate(member.rows for member in self._members)]
        self.files = tuple(
            InputFile(member.uri, member.stored.size_bytes, member.stored.version, len(self._own_rows(index)))
            for index, member in enumerate(self._members)
        )
        self._view = View(self.schema, tuple(needed))

    def batches(self, wanted: Wanted = _everything) -> Iterator[RowBatch]:
        """All rows in order, without the batches for which `wanted(first_row, rows)` is false.

        Which rows make a batch does not depend on `wanted`, nor does a row's index.

        Raises:
            InputError: a file was changed since the reader was made, or is damaged.
            StorageError: storage refused.
        """
        for index, member in enumerate(self._members):
            if own := self._own_rows(index):
                _check_unchanged(self.files[index])
                start = self._starts[index]
                for chunk in member.chunks(self._view, own.stop, _shifted(wanted, start, own)):
                    chunk = chunk.within(own)
                    yield RowBatch(start + chunk.first_row, chunk.carried, public(member.uri), chunk.values)

    def _own_rows(self, index: int) -> range:
        """Which of a file's passing rows belong to this table."""
        start, stop = self._starts[index : index + 2]
        first, last = max(self.first_row, start), min(self.first_row + self.rows, stop)
        return range(first - start, last - start) if first < last else range(0)


def _shifted(wanted: Wanted, by: int, own: range) -> Wanted:
    def wanted_here(first_row: int, rows: int) -> bool:
        first, stop = max(first_row, own.start), min(first_row + rows, own.stop)
        return first < stop and wanted(first + by, stop - first)

    return wanted_here


def _extent(rows: int, spec: Input) -> tuple[int, int]:
    """Where the shard begins and ends in a table of `rows` passing rows; all shards are equally long, but for a row."""
    rows = rows if spec.limit is None else min(rows, spec.limit)
    index, count = spec.shard_of
    return rows * index // count, rows * (index + 1) // count


def input_objects(spec: Input) -> tuple[StoredObject, ...]:
    """The files that the input names, as storage describes them; none is opened. Raises as `TableReader`."""
    with ThreadPoolExecutor(_DESCRIBED_AT_ONCE, thread_name_prefix="objects") as pool:
        return tuple(pool.map(describe, [uri for uri, _ in _find(spec)]))


def _open_files(spec: Input, condition: Condition | None) -> list[Member]:
    found = [(uri, names_in(folders) if spec.partitions != "off" else {}) for uri, folders in _find(spec)]
    path_schema = types_of(names for _, names in found)
    paths = [(uri, scalars(names, path_schema)) for uri, names in found]
    if condition is None and spec.limit is not None:
        return list(_until_limit(paths, spec))
    if condition is not None:
        possible = Filter(condition, path_schema, partial=True)
        fitting = [
            (uri, constants)
            for uri, constants in paths
            if possible.may_pass({name: Bounds.of(value) for name, value in constants.items()})
        ]
        paths = fitting or paths[:1]  # one shows the columns
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="inputs") as pool:
        return list(pool.map(lambda path: _open(path[0], path[1], spec, None), paths))


def _until_limit(paths: Sequence[tuple[str, dict[str, pa.Scalar]]], spec: Input) -> Iterator[Member]:
    left = spec.limit or 0
    for index, (uri, constants) in enumerate(paths):
        if left > 0 or index == 0:
            member = _open(uri, constants, spec, left)
            left -= member.rows
            yield member


def _open(uri: str, constants: dict[str, pa.Scalar], spec: Input, limit: int | None) -> Member:
    stored = describe(uri)
    return Member(_SOURCES[_format(uri, spec)](uri, limit), stored, constants)


def _select_rows(members: list[Member], filter_: Filter, schema: pa.Schema, limit: int | None) -> None:
    """Leaves away the files after the one with the last row, but never all."""
    left = limit
    for index, member in enumerate(members):
        if left is not None and left <= 0 and index > 0:
            del members[index:]
            return
        member.select(filter_, schema)
        left = None if left is None else left - member.rows


def _find(spec: Input) -> list[tuple[str, str]]:
    """The URIs of the files, sorted, each with the folders whose names may be columns."""

    def is_data(path: str) -> bool:
        return spec.format != "auto" or _by_ending(path) is not None

    found: dict[str, str] = {}
    for uri in spec.uris:
        root = "" if spec.partitions == "uri" else search_root(uri)
        for file in list_files(uri, is_data):
            found.setdefault(file, file[len(root) :].rpartition("/")[0] if file.startswith(root) else "")
    if not found:
        endings = "" if spec.format != "auto" else f" with an ending of {', '.join(_ENDINGS)}"
        raise InputError(
            f"input.uri: no files{endings} at {', '.join(spec.uris)}; names that begin with _ or . do not count"
        )
    return sorted(found.items())


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


def _unify(sources: Sequence[Member]) -> pa.Schema:
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
    known = {field.name: field for field in table}
    for where, name in asked:
        if name not in known and not may_be_unknown:
            raise SpecError(f"{where}: the input has no column {name!r}; {_hint(name, table.names)}")
    if len(set(carried)) < len(carried):
        raise SpecError(f"input.columns: {list(carried)} names a column twice; name each once")
    return pa.schema([known.get(name, pa.field(name, pa.string())) for name in carried])


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return f"{guess}its columns are {', '.join(map(repr, names[:30])) or 'none'}{more}"


def _shows_no_columns(sources: Sequence[Source]) -> bool:
    """JSONL without a single readable object says nothing about its columns, so none can be called missing."""
    return all(isinstance(source, JsonlSource) and not source.schema for source in sources)


def _check_needed(member: Member, needed: Sequence[str]) -> None:
    missing = set(needed).difference(member.schema.names)
    if missing and not isinstance(member.source, JsonlSource):
        raise InputError(f"{member.uri}: has no column {min(missing)!r}, which the job needs and other files have")

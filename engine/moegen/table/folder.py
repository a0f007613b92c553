"""The output folder: the parts that are there, and the one way in which another comes to be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from moegen.errors import InputError, SpecError, StorageError
from moegen.row import RowResult
from moegen.spec import Output
from moegen.storage import check_writable, describe, join, list_below, list_names, names_below, put_create, remove
from moegen.table.batch_plan import BATCH_NAME
from moegen.table.manifest import MANIFEST_NAME, SUCCESS_NAME, read_manifest
from moegen.table.part import Footer, PartInfo, Totals, encode, is_part_name, part_name, read_footer, unwritable_column
from moegen.table.partitions import folder_of

_FOOTERS_AT_ONCE = 16  # requests in flight, where storage is far away
_LONGEST_FOLDER = 200  # characters; file systems end at 255 bytes


@dataclass(frozen=True)
class StoredPart:
    """A committed part: its file, or with `output.partition_by` one for each of its values, and what they count."""

    files: tuple[PartInfo, ...]
    totals: Totals

    @property
    def rows(self) -> int:
        return self.totals.rows

    def __add__(self, other: StoredPart) -> StoredPart:
        return StoredPart(self.files + other.files, self.totals + other.totals)


@dataclass(frozen=True)
class OutputFolder:
    """The folder of one piece of work: `rows` rows under `fingerprint`, in parts of `spec.rows_per_part`.

    Part k holds the rows [k * rows_per_part, (k + 1) * rows_per_part), counted from the first row of the work. Files
    that are not moegen's are left alone.
    """

    spec: Output
    rows: int
    fingerprint: str
    job_key: str
    first_row: int = 0  # row_index of the first; a shard's is not 0

    @property
    def part_count(self) -> int:
        """At least one: a table without rows still has its schema."""
        return max(1, -(-self.rows // self.spec.rows_per_part))

    def rows_of(self, index: int) -> range:
        """The rows that belong to a part."""
        size, first = self.spec.rows_per_part, self.first_row
        return range(first + index * size, first + min((index + 1) * size, self.rows))

    def parts_of(self, first_row: int, rows: int) -> range:
        """The parts that some rows touch."""
        size, first_row = self.spec.rows_per_part, first_row - self.first_row
        return range(first_row // size, -(-(first_row + rows) // size))

    def clear(self) -> None:
        """Removes every part, the manifest, `_SUCCESS` and what is kept for resuming, whatever work they are of."""
        parts = {*part_names(self.spec.uri, self.spec.partition_by), *self._listed_parts()}
        for name in [SUCCESS_NAME, MANIFEST_NAME, *sorted(parts)]:  # the proof goes first
            remove(self._uri(name))
        for uri in list_below(self._uri(BATCH_NAME)):
            if not uri.rpartition("/")[2].startswith("lease-"):  # who runs stays known
                remove(uri)

    def check_parts(self) -> None:
        """Reads nothing but names.

        Raises:
            SpecError: the folder holds parts of other work.
            StorageError: storage refused.
        """
        own = {self._name(index) for index in range(self.part_count)}
        for name in part_names(self.spec.uri, self.spec.partition_by):
            if name.rpartition("/")[2] not in own:
                raise self._other_work(name)

    def check_schema(self, schema: pa.Schema) -> None:
        """Raises `SpecError` when the format cannot hold a column."""
        try:
            self._encode(0, pa.Table.from_batches([], schema), Totals())
        except InputError as error:
            raise SpecError(f"output.format: {error}") from error

    def stored_parts(self) -> dict[int, StoredPart]:
        """Part index -> part, for the parts that earlier runs of this work committed.

        Raises:
            SpecError: the folder holds other work.
            StorageError: storage refused, or a part contradicts its name.
        """
        self.check_parts()
        own = {self._name(index): index for index in range(self.part_count)}
        names = part_names(self.spec.uri, self.spec.partition_by)
        digests = self._known_digests()
        found: dict[int, StoredPart] = {}
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="footers") as pool:
            for name, file in zip(
                names, pool.map(lambda name: self._stored(name, digests.get(name)), names), strict=True
            ):
                index = own[name.rpartition("/")[2]]
                found[index] = found[index] + file if index in found else file
        return {index: part for index, part in found.items() if self._is_whole(index, part)}

    def _is_whole(self, index: int, part: StoredPart) -> bool:
        """With `output.partition_by`, a crash may have come between two files of a part: then it is no part yet."""
        rows, expected = part.rows, len(self.rows_of(index))
        if rows > expected or (rows < expected and not self.spec.partition_by):
            uri = self._uri(part.files[0].name)
            raise StorageError(f"{uri}: says {rows} rows where {expected} belong; remove it and run again")
        return rows == expected

    def prepare(self) -> None:
        """Finds out before the first row, not at the first part, whether the rest can be written.

        Raises:
            StorageError: storage refused.
        """
        check_writable(self.spec.uri)
        remove(self._uri(SUCCESS_NAME))  # a part that it vouched for is gone

    def commit(self, index: int, table: pa.Table, results: Sequence[RowResult]) -> StoredPart:
        """Stores a part by create-only PUTs; where another attempt was faster, what that one stored counts.

        A part is one file, there or not; or, with `output.partition_by`, one for each of its rows' values there, whole
        when the rows of its files are as many as belong to it. Which rows are in which depends on the input alone.

        Raises:
            InputError: the format cannot hold a column's value.
            StorageError: storage refused.
        """
        groups = self._groups(table)
        files = [self._commit_file(index, folder, table, results, rows) for folder, rows in groups.items()]
        return sum(files[1:], files[0])

    def check_values(self, carried: pa.Table) -> None:
        """Before rows are run: whether folders can be named after them. Raises `InputError` when one cannot."""
        for column in self.spec.partition_by:
            for value in map(_folder_value, pc.unique(carried[column]).to_pylist()):
                if len(folder_of({column: value})) > _LONGEST_FOLDER:
                    raise InputError(
                        f"output.partition_by: a value of column {column!r} makes a folder's name of more than "
                        f"{_LONGEST_FOLDER} characters; choose a column of few and short values"
                    )

    def _groups(self, table: pa.Table) -> dict[str, list[int]]:
        """Folder -> the table's rows that belong there, in order; an empty table has its place in the folder itself."""
        groups: dict[str, list[int]] = {}
        columns = [table[column].to_pylist() for column in self.spec.partition_by]
        if not columns or not table.num_rows:
            return {"": list(range(table.num_rows))}
        for row, values in enumerate(zip(*columns, strict=True)):
            names = dict(zip(self.spec.partition_by, map(_folder_value, values), strict=True))
            groups.setdefault(folder_of(names), []).append(row)
        return dict(sorted(groups.items()))

    def _commit_file(
        self, index: int, folder: str, table: pa.Table, results: Sequence[RowResult], rows: Sequence[int]
    ) -> StoredPart:
        name = f"{folder}/{self._name(index)}".lstrip("/")
        if folder:
            table, results = table.take(rows), [results[row] for row in rows]
        totals = Totals.of(results)
        data = self._encode(index, table, totals)
        if not put_create(self._uri(name), data):
            stored = self._stored(name, None)
            if stored.rows != len(rows):
                raise StorageError(
                    f"{self._uri(name)}: says {stored.rows} rows where {len(rows)} belong; remove it and run again"
                )
            return stored
        return StoredPart((PartInfo(name, len(rows), len(data), hashlib.sha256(data).hexdigest()),), totals)

    def _name(self, index: int) -> str:
        return part_name(index, self.fingerprint, self.spec.format)

    def _uri(self, name: str) -> str:
        return join(self.spec.uri, name)

    def _encode(self, index: int, table: pa.Table, totals: Totals) -> bytes:
        footer = Footer(self.job_key, self.fingerprint, index, self.spec.prefix, totals)
        if self.spec.partition_by:  # the folder says it
            table = table.drop_columns([name for name in self.spec.partition_by if name in table.column_names])
        try:
            return encode(table, footer, self.spec.format)
        except pa.ArrowException as error:
            column = unwritable_column(table, footer, self.spec.format)
            raise InputError(
                f"{self.spec.format} cannot hold column {column!r}: {error};"
                " leave it out with input.columns, or use another output.format"
            ) from error

    def _listed_parts(self) -> list[str]:
        """The parts that a manifest lists: earlier work may have had other folders."""
        try:
            manifest = read_manifest(self.spec.uri)
        except InputError:  # of another version
            return []
        names = [] if manifest is None else [part.name for part in manifest.parts]
        return [name for name in names if is_partition_path(name)]

    def _known_digests(self) -> dict[str, str | None]:
        manifest = read_manifest(self.spec.uri)
        if manifest is None:
            return {}
        if manifest.fingerprint != self.fingerprint:
            raise self._other_work(MANIFEST_NAME)
        return {part.name: part.sha256 for part in manifest.parts}

    def _stored(self, name: str, sha256: str | None) -> StoredPart:
        uri = self._uri(name)
        footer = read_footer(uri)
        if not self.fingerprint.startswith(footer.fingerprint):  # a part of no lines names none
            raise self._other_work(name)
        info = PartInfo(name, footer.totals.rows, describe(uri).size_bytes, sha256)
        return StoredPart((info,), footer.totals)

    def _other_work(self, name: str) -> SpecError:
        return SpecError(
            f"output.uri: {self._uri(name)} belongs to other work (another input, prompt, model, sampling or output"
            " format); use another folder, or output.mode=new_run to remove it"
        )


def part_names(folder: str, partition_by: Sequence[str]) -> list[str]:
    """The names of the parts in an output folder, with the folders after partition columns that they are in.

    Folders of other names are not looked into: they may be outputs themselves.
    """
    if not partition_by:
        return list(filter(is_part_name, list_names(folder)))
    wanted: tuple[list[str], ...] = ([], [*partition_by])
    return [name for name in names_below(folder) if is_partition_path(name) and _columns(name) in wanted]


def is_partition_path(name: str) -> bool:
    """Whether this is a part, below nothing but folders like `lang=de`."""
    *folders, file = name.split("/")
    return is_part_name(file) and all("=" in folder for folder in folders)


def _columns(name: str) -> list[str]:
    return [unquote(folder.partition("=")[0]) for folder in name.split("/")[:-1]]


def _folder_value(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, date) else str(value)

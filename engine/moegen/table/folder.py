"""The output folder: the parts that are there, and the one way in which another comes to be."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from moegen.errors import InputError, SpecError, StorageError
from moegen.spec import Output
from moegen.storage import check_writable, describe, join, list_below, list_names, put_create, remove
from moegen.table.batch_plan import BATCH_NAME
from moegen.table.manifest import MANIFEST_NAME, SUCCESS_NAME, read_manifest
from moegen.table.part import Footer, PartInfo, Totals, encode, is_part_name, part_name, read_footer, unwritable_column

_FOOTERS_AT_ONCE = 16  # requests in flight, where storage is far away


@dataclass(frozen=True)
class StoredPart:
    """A committed part and what its footer counts."""

    info: PartInfo
    totals: Totals


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
        names = list_names(self.spec.uri)
        for name in [SUCCESS_NAME, MANIFEST_NAME, *filter(is_part_name, names)]:  # the proof goes first
            if name in names:
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
        for name in filter(is_part_name, list_names(self.spec.uri)):
            if name not in own:
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
        found = [own[name] for name in list_names(self.spec.uri) if name in own]
        digests = self._known_digests()
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="footers") as pool:
            stored = pool.map(lambda index: self._stored(index, digests.get(self._name(index))), found)
            return dict(zip(found, stored, strict=True))

    def prepare(self) -> None:
        """Finds out before the first row, not at the first part, whether the rest can be written.

        Raises:
            StorageError: storage refused.
        """
        check_writable(self.spec.uri)
        remove(self._uri(SUCCESS_NAME))  # a part that it vouched for is gone

    def commit(self, index: int, table: pa.Table, totals: Totals) -> StoredPart:
        """Stores a part by one create-only PUT; when another attempt was faster, what that one stored counts.

        Raises:
            InputError: the format cannot hold a column's value.
            StorageError: storage refused.
        """
        data = self._encode(index, table, totals)
        if not put_create(self._uri(self._name(index)), data):
            return self._stored(index, None)
        digest = hashlib.sha256(data).hexdigest()
        return StoredPart(PartInfo(self._name(index), table.num_rows, len(data), digest), totals)

    def _name(self, index: int) -> str:
        return part_name(index, self.fingerprint, self.spec.format)

    def _uri(self, name: str) -> str:
        return join(self.spec.uri, name)

    def _encode(self, index: int, table: pa.Table, totals: Totals) -> bytes:
        footer = Footer(self.job_key, self.fingerprint, index, self.spec.prefix, totals)
        try:
            return encode(table, footer, self.spec.format)
        except pa.ArrowException as error:
            column = unwritable_column(table, footer, self.spec.format)
            raise InputError(
                f"{self.spec.format} cannot hold column {column!r}: {error};"
                " leave it out with input.columns, or use another output.format"
            ) from error

    def _known_digests(self) -> dict[str, str | None]:
        manifest = read_manifest(self.spec.uri)
        if manifest is None:
            return {}
        if manifest.fingerprint != self.fingerprint:
            raise self._other_work(MANIFEST_NAME)
        return {part.name: part.sha256 for part in manifest.parts}

    def _stored(self, index: int, sha256: str | None) -> StoredPart:
        uri = self._uri(self._name(index))
        footer = read_footer(uri)
        if not self.fingerprint.startswith(footer.fingerprint):  # a part of no lines names none
            raise self._other_work(self._name(index))
        rows, expected = footer.totals.rows, len(self.rows_of(index))
        if rows != expected:
            raise StorageError(f"{uri}: says {rows} rows where {expected} belong; remove it and run again")
        return StoredPart(PartInfo(self._name(index), rows, describe(uri).size_bytes, sha256), footer.totals)

    def _other_work(self, name: str) -> SpecError:
        return SpecError(
            f"output.uri: {self._uri(name)} belongs to other work (another input, prompt, model, sampling or output"
            " format); use another folder, or output.mode=new_run to remove it"
        )

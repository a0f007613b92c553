"""The output table: results in any order become parts in input order, each committed by one create-only PUT."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

import moegen
from moegen.errors import MoegenError
from moegen.row import RowResult
from moegen.spec import Output
from moegen.storage import public
from moegen.table.columns import Columns
from moegen.table.folder import OutputFolder, StoredPart
from moegen.table.lease import Lease
from moegen.table.manifest import Manifest, write_manifest
from moegen.table.part import Totals
from moegen.table.reader import InputFile, RowBatch
from moegen.table.schema import output_schema, to_table


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of one file, without the values that the engine has read."""

    first_row: int
    rows: int
    carried: pa.Table
    file: str


class _OpenPart:
    """The rows and results of one part until all are there."""

    def __init__(self, rows: range) -> None:
        self.rows = rows
        self._pieces: list[_Piece] = []
        self._unanswered: set[int] = set()
        self._results: dict[int, RowResult] = {}

    def add_batch(self, batch: RowBatch) -> range:
        """Keeps those of the batch's rows that belong here, and says which they are."""
        start = max(batch.first_row, self.rows.start)
        own = range(start, min(batch.first_row + batch.rows, self.rows.stop))
        if not self._unanswered.isdisjoint(own) or not self._results.keys().isdisjoint(own):
            raise MoegenError(f"rows {own.start} to {own.stop - 1} were added to the writer twice")
        offset = own.start - batch.first_row
        self._pieces.append(_Piece(own.start, len(own), batch.carried.slice(offset, len(own)), batch.file))
        self._unanswered.update(own)
        return own

    def add(self, result: RowResult) -> bool:
        """Keeps the result; whether the part is complete now."""
        if result.row_index not in self._unanswered:
            raise _not_awaited(result)
        self._unanswered.remove(result.row_index)
        self._results[result.row_index] = result
        return len(self._results) == len(self.rows)

    @property
    def results(self) -> list[RowResult]:
        return [self._results[row] for row in self.rows]

    def table(self, output: Output, columns: Columns | None) -> pa.Table:
        """The part's rows in input order; the part must be complete."""
        pieces = sorted(self._pieces, key=lambda piece: piece.first_row)
        files = [piece.file for piece in pieces for _ in range(piece.rows)]
        return to_table(pa.concat_tables(piece.carried for piece in pieces), files, self.results, output, columns)


class TableWriter:
    """Writes the parts of one output folder, going on from the parts that earlier runs of the same work committed.

    A part appears at once, when its last result is there, under a name and with bytes that depend only on the work.
    Memory holds the parts that are begun. With a lease, it is taken once nothing speaks against the work and before
    anything is written, and looked at before every commit.

    Raises:
        SpecError: the folder holds other work, a result column collides, or the format cannot hold a column.
        StorageError: storage refused.
        Interrupted: another runner has the lease.
    """

    schema: pa.Schema  # of the output table
    resumed: Totals  # what was committed before this run
    before_commit: Callable[[int], None]  # called with the number of every part that is about to be stored

    def __init__(
        self,
        spec: Output,
        input_schema: pa.Schema,
        total_rows: int,
        fingerprint: str,
        job_key: str,
        lease: Lease | None = None,
        columns: Columns | None = None,
        first_row: int = 0,
    ) -> None:
        self.before_commit = lambda part: None
        self.schema = output_schema(input_schema, spec, columns)
        self._input_schema, self._lease, self._columns = input_schema, lease, columns
        self._folder = OutputFolder(spec, total_rows, fingerprint, job_key, first_row)
        if spec.mode == "create":
            self._folder.check_parts()
        self._folder.check_schema(self.schema)
        if lease is not None:
            lease.take()
        if spec.mode == "new_run":
            self._folder.clear()
        self._stored = self._folder.stored_parts()
        if len(self._stored) < self._folder.part_count:
            self._folder.prepare()
        self._open: dict[int, _OpenPart] = {}
        self.resumed = self.totals

    @property
    def totals(self) -> Totals:
        """Counts over all committed parts."""
        return sum((part.totals for part in self._stored.values()), Totals())

    @property
    def committed(self) -> list[int]:
        """The numbers of the committed parts."""
        return sorted(self._stored)

    @property
    def complete(self) -> bool:
        """Whether no row remains to be answered."""
        return self.totals.rows == self._folder.rows

    def is_committed(self, first_row: int, rows: int) -> bool:
        """Whether every part that these rows touch is stored, so that they need not be read."""
        return all(index in self._stored for index in self._folder.parts_of(first_row, rows))

    def add_batch(self, batch: RowBatch) -> list[int]:
        """Takes the carried columns of rows to come; returns the indexes of the rows that still want a result."""
        stop = batch.first_row + batch.rows
        if stop > self._folder.first_row + self._folder.rows:
            raise MoegenError(f"row {stop - 1} was added to the writer of a table of {self._folder.rows} rows")
        self._folder.check_values(batch.carried)
        wanted: list[int] = []
        for index in self._folder.parts_of(batch.first_row, batch.rows):
            if index not in self._stored:
                part = self._open.setdefault(index, _OpenPart(self._folder.rows_of(index)))
                wanted.extend(part.add_batch(batch))
        return wanted

    def add(self, result: RowResult) -> StoredPart | None:
        """Takes one row's result, in any order; the part that it completed, now committed, if it did.

        Raises:
            MoegenError: a row that was answered already, or never added.
            InputError: a carried value that the output format cannot hold.
            StorageError: storage refused.
            Interrupted: the lease is lost.
        """
        (index,) = self._folder.parts_of(result.row_index, 1)
        part = self._open.get(index)
        if part is None:
            raise _not_awaited(result)
        if not part.add(result):
            return None
        table = part.table(self._folder.spec, self._columns)
        self._check_lease()
        self.before_commit(index)
        self._stored[index] = self._folder.commit(index, table, part.results)
        del self._open[index]
        return self._stored[index]

    def finish(
        self,
        *,
        job_name: str,
        model_digest: str,
        input_files: Sequence[InputFile],
        started_at: float,
        journaled: Totals | None = None,
        max_error_rate: float = 1.0,
        register: Callable[[Manifest], object] | None = None,
        weights: dict[str, Any] | None = None,
    ) -> Manifest:
        """Proves rows in = rows out, then writes the manifest and, unless too many rows failed, `_SUCCESS`.

        Args:
            job_name, model_digest, input_files: for the manifest.
            started_at: Unix time in seconds.
            journaled: counts of the rows that this run found in the journal.
            max_error_rate: failed rows as a share of all, up to which the job has succeeded.
            register: called between manifest and `_SUCCESS`.
            weights: what it cost to keep experts otherwise than they are stored, if they were.

        Raises:
            MoegenError: rows are missing.
            StorageError: storage refused.
            Interrupted: the lease is lost.
        """
        self._check_lease()
        if self._folder.rows == 0 and not self._stored:
            empty = to_table(pa.Table.from_batches([], self._input_schema), [], [], self._folder.spec, self._columns)
            self._stored[0] = self._folder.commit(0, empty, [])
        totals = self.totals
        if totals.rows != self._folder.rows:
            raise MoegenError(f"{self._folder.rows} rows went in, but {totals.rows} came out; no _SUCCESS was written")
        ended_at = time.time()
        seconds = max(ended_at - started_at, 1e-9)
        found = self.resumed + (journaled or Totals())
        manifest = Manifest(
            job_key=self._folder.job_key,
            job_name=job_name,
            fingerprint=self._folder.fingerprint,
            engine_version=moegen.__version__,
            model_digest=model_digest,
            format=self._folder.spec.format,
            rows=totals.rows,
            statuses=totals.statuses,
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            parts=tuple(file for index in sorted(self._stored) for file in self._stored[index].files),
            input_files=tuple(replace(file, uri=public(file.uri)) for file in input_files),
            resumed_rows=self.resumed.rows,
            started_at=started_at,
            ended_at=ended_at,
            seconds=seconds,
            rows_per_s=(totals.rows - found.rows) / seconds,
            tokens_per_s=(totals.completion_tokens - found.completion_tokens) / seconds,
            journal_rows=found.rows - self.resumed.rows,
            dedup_rows=totals.dedup_rows,
            dedup_tokens=totals.dedup_tokens,
            create_only=self._lease is None or self._lease.exclusive,
            weights=weights,
        )
        write_manifest(self._folder.spec.uri, manifest, success=totals.error_rate <= max_error_rate, register=register)
        return manifest

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()


def _not_awaited(result: RowResult) -> MoegenError:
    return MoegenError(f"row {result.row_index} was answered twice, or before it was added to the writer")

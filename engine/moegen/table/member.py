"""One input file as a member of the table: the columns that its path adds, and those of its rows that pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import pyarrow as pa

from moegen.row import RowError
from moegen.storage import StoredObject
from moegen.table.filter import Bounds, Filter
from moegen.table.selection import Selection
from moegen.table.source import Chunk, Source, View, Wanted


@dataclass
class Member:
    """A file of the table. A column that its path names is the path's, whatever the file has under that name."""

    source: Source
    stored: StoredObject
    constants: Mapping[str, pa.Scalar]  # the path's columns; equally many for all files
    selection: Selection | None = None  # None: every row

    @property
    def uri(self) -> str:
        return self.stored.uri

    @property
    def schema(self) -> pa.Schema:
        own = [field for field in self.source.schema if field.name not in self.constants]
        return pa.schema([*own, *(pa.field(name, value.type) for name, value in self.constants.items())])

    @property
    def rows(self) -> int:
        """Those that pass."""
        return self.source.rows if self.selection is None else self.selection.rows

    def select(self, filter_: Filter, schema: pa.Schema) -> None:
        """Reads the filter's columns where they can match, and keeps which rows pass.

        A row that cannot be read passes: what it is cannot be known, and it must not vanish.

        Args:
            filter_: bound to `schema`.
            schema: of the whole table.

        Raises:
            InputError, StorageError: as `Source.chunks`.
        """
        mask = np.zeros(self.source.rows, bool)
        known = {name: Bounds.of(value) for name, value in self.constants.items()}
        if filter_.may_pass(known):
            view = View(pa.schema([schema.field(name) for name in filter_.columns]), ())

            def may_pass(first_row: int, rows: int) -> bool:
                return filter_.may_pass(self.source.bounds(first_row, filter_.columns) | known)

            for chunk in self._whole(view, self.source.rows, may_pass):
                unread = np.fromiter((isinstance(row, RowError) for row in chunk.values), bool, len(chunk.values))
                mask[chunk.first_row :][: len(unread)] = filter_.mask(chunk.carried) | unread
        self.selection = Selection(mask)

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """The first `rows` rows that pass, without the chunks that are not wanted; rows are counted among those."""
        selection = self.selection
        if selection is None:
            yield from self._whole(view, rows, wanted)
            return

        def any_wanted(first_row: int, count: int) -> bool:
            first = selection.before(first_row)
            stop = min(selection.before(first_row + count), rows)
            return stop > first and wanted(first, stop - first)

        for chunk in self._whole(view, self.source.rows, any_wanted):
            mask = selection.mask(chunk.first_row, len(chunk.values))
            first_row = selection.before(chunk.first_row)
            kept = chunk.carried.filter(pa.array(mask)) if chunk.carried.num_columns else chunk.carried
            yield Chunk(first_row, kept, list(compress(chunk.values, mask))).within(range(rows))

    def _whole(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """Chunks of the file, rows counted as they are in it, with the path's columns."""
        if not self.constants:
            yield from self.source.chunks(view, rows, wanted)
            return
        own = pa.schema([field for field in view.carried if field.name not in self.constants])
        needed = tuple(name for name in view.needed if name not in self.constants)
        path = {name: self.constants[name].as_py() for name in view.needed if name in self.constants}
        for chunk in self.source.chunks(View(own, needed), rows, wanted):
            values = [row if isinstance(row, RowError) else {**row, **path} for row in chunk.values]
            yield replace(chunk, carried=self._with_path(chunk, view.carried), values=values)

    def _with_path(self, chunk: Chunk, schema: pa.Schema) -> pa.Table:
        columns = [
            pa.repeat(self.constants[field.name], len(chunk.values)).cast(field.type)
            if field.name in self.constants
            else chunk.carried[field.name]
            for field in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

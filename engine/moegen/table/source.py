"""What every kind of input file offers: a schema, a row count, and its rows in chunks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from moegen.errors import InputError
from moegen.row import RowError
from moegen.storage import storage_errors
from moegen.table.filter import Bounds
from moegen.units import MIB

CHUNK_ROWS = 1024  # at most, in one chunk
CHUNK_BYTES = 8 * MIB  # about as many, in one chunk of more than one row

Values = dict[str, Any] | RowError
Wanted = Callable[[int, int], bool]  # (first row, rows) -> whether anybody needs them


@dataclass(frozen=True)
class View:
    """What is wanted of a table: the columns to carry, as they shall look, and those whose values are needed."""

    carried: pa.Schema
    needed: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one file, seen through a `View`."""

    first_row: int  # in the file
    carried: pa.Table
    values: list[Values]  # per row

    def within(self, rows: range) -> Chunk:
        """Those of its rows that are among `rows`."""
        start = max(rows.start - self.first_row, 0)
        stop = min(rows.stop - self.first_row, len(self.values))
        if (start, stop) == (0, len(self.values)):
            return self
        return Chunk(self.first_row + start, self.carried.slice(start, stop - start), self.values[start:stop])


class Source(Protocol):
    """One input file. `schema` names every column of the file, `rows` counts its rows."""

    uri: str
    schema: pa.Schema
    rows: int

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """The first `rows` rows, without the chunks that are not wanted. Where chunks begin depends on neither."""

    def bounds(self, first_row: int, names: Sequence[str]) -> dict[str, Bounds]:
        """What is known, without reading it, of the chunk that begins at `first_row`; a column may be missing."""


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Tells a damaged file (`InputError`) from storage that refuses (`StorageError`)."""
    with storage_errors(uri, "read"):
        try:
            yield
        except MemoryError:
            raise
        except (pa.ArrowException, EOFError, zlib.error) as error:
            raise _damaged(uri, error) from error
        except OSError as error:
            if error.errno is not None:  # the system's or the backend's; pyarrow's and gzip's own carry no number
                raise
            raise _damaged(uri, error) from error


def _damaged(uri: str, error: Exception) -> InputError:
    return InputError(f"{uri}: cannot be read: {error}; the file is damaged or of another format (see input.format)")

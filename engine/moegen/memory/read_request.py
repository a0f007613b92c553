"""Reads of experts from the checkpoint: few and large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moegen.memory.coded_rows import CodedRows
from moegen.memory.direct_read import READ_BYTES, DirectFiles, ReadBuffer
from moegen.memory.stored_rows import Rows
from moegen.ops.coded_matrix import CodedMatrix
from moegen.ops.expert_weights import ExpertGroup
from moegen.units import KIB, MIB

_ENOUGH_BYTES = MIB  # a request of this size ends with an expert, so that experts can be left out
_GAP_BYTES = 64 * KIB  # between two parts, sooner read than skipped


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one projection."""

    is_up: bool
    rows: Rows


@dataclass(frozen=True)
class ReadRequest:
    """One read from one file, and the rows that it brings."""

    file: str
    start: int
    nbytes: int
    parts: tuple[Part, ...]

    @property
    def experts(self) -> frozenset[int]:
        """Whose rows it brings, by their numbers in the layer."""
        return frozenset(part.rows.expert for part in self.parts)

    def read_into(self, group: ExpertGroup, files: DirectFiles, buffer: ReadBuffer) -> None:
        """Reads and places. Raises `StorageError` when the disk or the file fails."""
        data = files.read(self.file, self.start, self.nbytes, buffer)
        for is_up, matrix in ((True, group.up), (False, group.down)):
            if isinstance(matrix, CodedMatrix) and matrix.places_runs and is_up in self._runs:
                matrix.place_runs(data, self._runs[is_up], group.first)
                continue
            for rows in (part.rows for part in self.parts if part.is_up == is_up):
                offset = rows.start - self.start
                rows.place(data[offset : offset + rows.nbytes], matrix, group.first)

    @cached_property  # it is read again in every pass
    def _runs(self) -> dict[bool, np.ndarray]:
        """By projection, if all that it brings is coded: the runs, `[N, F]`."""
        found: dict[bool, np.ndarray] = {}
        for is_up in (True, False):
            rows = [part.rows for part in self.parts if part.is_up == is_up]
            coded = [own.run(self.start) for own in rows if isinstance(own, CodedRows)]
            if coded and len(coded) == len(rows):
                found[is_up] = np.array(coded, np.int64)
        return found


def coalesced(parts: Iterable[Part]) -> Iterator[ReadRequest]:
    """In the order of the files; neighbours become one request."""
    together: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.rows.file, part.rows.start)):
        if together and not _neighbours(together[0].rows, together[-1].rows, part.rows):
            yield _request(together)
            together = []
        together.append(part)
    if together:
        yield _request(together)


def _neighbours(first: Rows, last: Rows, rows: Rows) -> bool:
    near = rows.file == first.file and rows.start - last.end <= _GAP_BYTES and rows.end - first.start <= READ_BYTES
    return near and (rows.expert == last.expert or last.end - first.start < _ENOUGH_BYTES)


def _request(parts: list[Part]) -> ReadRequest:
    start, end = parts[0].rows.start, max(part.rows.end for part in parts)
    return ReadRequest(parts[0].rows.file, start, end - start, tuple(parts))

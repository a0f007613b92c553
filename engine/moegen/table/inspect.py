"""A look into an output folder: what was counted, the first rows, and examples of every kind of error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moegen.errors import InputError
from moegen.row import RowError
from moegen.storage import join, list_names
from moegen.table.arrow_source import ArrowSource, ParquetSource, to_python
from moegen.table.manifest import SUCCESS_NAME, Manifest, read_manifest
from moegen.table.part import Footer, Totals, is_part_name, read_footer
from moegen.table.source import View


@dataclass(frozen=True)
class ErrorExample:
    """One row that has an error."""

    row_index: int
    status: str
    message: str
    stage: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_output` found; without a manifest the job has not finished."""

    uri: str
    manifest: Manifest | None
    success: bool  # whether _SUCCESS is there
    parts: int
    totals: Totals  # over the parts that are there
    rows: list[dict[str, Any]]  # the first ones, every column
    errors: dict[str, list[ErrorExample]]  # error code -> examples


def inspect_output(uri: str, max_rows: int = 5, max_errors: int = 3) -> Inspection:
    """Reads footers, the first rows, and the error column of parts with rows that are not `ok`.

    Raises:
        InputError: the folder holds no output.
        StorageError: storage refused.
    """
    names = list_names(uri)
    parts = [join(uri, name) for name in names if is_part_name(name)]
    if not parts:
        raise InputError(f"{uri}: holds no moegen output (no part-*); check the URI, or wait for the first part")
    footers = [read_footer(part) for part in parts]
    return Inspection(
        uri=uri,
        manifest=read_manifest(uri),
        success=SUCCESS_NAME in names,
        parts=len(parts),
        totals=sum((footer.totals for footer in footers), Totals()),
        rows=list(part_rows(parts[0], None, max_rows)),
        errors=_examples(parts, footers, max_errors),
    )


def _examples(parts: Sequence[str], footers: Sequence[Footer], limit: int) -> dict[str, list[ErrorExample]]:
    found: dict[str, list[ErrorExample]] = {}
    for part, footer in zip(parts, footers, strict=True):
        if footer.totals.statuses.keys() - {"ok", "length"}:
            for code, example in _errors(part, footer.prefix):
                examples = found.setdefault(code, [])
                if len(examples) < limit:
                    examples.append(example)
    return found


def _errors(part: str, prefix: str) -> Iterator[tuple[str, ErrorExample]]:
    names = [prefix + name for name in ("row_index", "status", "error")]
    for row in part_rows(part, names, None):
        row_index, status, error = (row[name] for name in names)
        if error is not None:
            yield error["code"], ErrorExample(row_index, status, error["message"], error["stage"])


def part_rows(part: str, names: Sequence[str] | None, limit: int | None) -> Iterator[dict[str, Any]]:
    """The first `limit` rows; a cell that Python has no value for is the code of its error in angle brackets."""
    source = ParquetSource(part, None) if part.endswith(".parquet") else ArrowSource(part, None)
    schema = source.schema if names is None else pa.schema([source.schema.field(name) for name in names])
    for chunk in source.chunks(View(schema, ()), source.rows if limit is None else limit, lambda *_: True):
        columns = [to_python(chunk.carried[name], name) for name in schema.names]
        for cells in zip(*columns, strict=True):
            shown = (f"<{cell.code}>" if isinstance(cell, RowError) else cell for cell in cells)
            yield dict(zip(schema.names, shown, strict=True))

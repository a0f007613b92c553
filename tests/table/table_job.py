"""What the table tests do to a table: run it through reader and writer with an answer made from each row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from moegen.row import RowError, RowResult, Status
from moegen.spec import Input, Output
from moegen.table.manifest import Manifest
from moegen.table.reader import RowBatch, TableReader
from moegen.table.writer import TableWriter

FINGERPRINT = "0123456789abcdef" * 4
Order = Callable[[list[RowResult]], Iterable[RowResult]]


def read_all(uri: str | Path | Sequence[str], needed: Sequence[str] = (), **fields: Any) -> list[RowBatch]:
    spec = Input(uri if isinstance(uri, (str, tuple)) else str(uri), **fields)
    return list(TableReader(spec, needed).batches())


def values(batches: Iterable[RowBatch]) -> list[Any]:
    """Per row, the needed values, or the code of the row's error."""
    return [row.code if isinstance(row, RowError) else row for batch in batches for row in batch.values]


def carried(batches: Iterable[RowBatch]) -> pa.Table:
    return pa.concat_tables([batch.carried for batch in batches])


def answer(row_index: int, row: dict[str, Any] | RowError) -> RowResult:
    if isinstance(row, RowError):
        return RowResult(row_index, Status.ERROR, error=row)
    text = f"answer to {row['prompt']}"
    return RowResult(row_index, Status.OK, text, finish_reason="stop", prompt_tokens=3, completion_tokens=2, seed=7)


def answers(reader: TableReader, writer: TableWriter) -> list[RowResult]:
    """Adds the batches that are not committed and answers their rows."""
    found = []
    for batch in reader.batches(lambda first_row, rows: not writer.is_committed(first_row, rows)):
        found += [answer(row, batch.values[row - batch.first_row]) for row in writer.add_batch(batch)]
    return found


def run(input_: Input, output: Output, order: Order = list, fingerprint: str = FINGERPRINT) -> Manifest:
    started_at = time.time()
    reader = TableReader(input_, ["prompt"])
    writer = TableWriter(output, reader.schema, reader.rows, fingerprint, "key", first_row=reader.first_row)
    for result in order(answers(reader, writer)):
        writer.add(result)
    return writer.finish(job_name="test", model_digest="m", input_files=reader.files, started_at=started_at)


def prompts(folder: Path, rows: int, row_group_rows: int = 100) -> Path:
    """A Parquet table with `id` and `prompt`."""
    table = pa.table({"id": range(rows), "prompt": [f"prompt {i}" for i in range(rows)]})
    path = folder / f"prompts-{rows}.parquet"
    pq.write_table(table, path, row_group_size=row_group_rows)
    return path


def part_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}

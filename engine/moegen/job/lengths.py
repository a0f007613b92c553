"""How long a job's prompts and answers are, from a few stretches of its table."""

from __future__ import annotations

from moegen.job.prepare import Prepared, Preparer
from moegen.plan.workload import Workload
from moegen.schedule.sequence import Request
from moegen.table.reader import TableReader

_STRETCHES = 4


def table_workload(reader: TableReader, preparer: Preparer) -> Workload | None:
    """Prompts as the job will encode them, from up to four of the table's batches; every answer as long as it may be.

    None when none of those rows can run.

    Raises:
        InputError, StorageError: as reading for the job itself would.
    """
    stride = max(reader.rows // _STRETCHES, 1)

    def chosen(first_row: int, rows: int) -> bool:
        return first_row % stride + rows >= stride

    lengths = [
        work(row.request)
        for batch in reader.batches(chosen)
        for row in preparer.prepare(list(enumerate(batch.values, batch.first_row)))
        if isinstance(row, Prepared)
    ]
    return Workload(reader.rows, tuple(lengths)) if lengths else None


def work(request: Request) -> tuple[int, int]:
    """Prompt tokens and answer tokens that take as long as this row: continuations are computed like prompts."""
    if not request.continuations:
        return len(request.token_ids), request.params.max_tokens
    return len(request.token_ids) + sum(len(tokens) - 1 for tokens in request.continuations), 1

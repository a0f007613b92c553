"""How long a job's prompts and answers are, and what prompts begin with, from a few stretches of its table."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from moegen.job.prepare import Prepared, Preparer
from moegen.plan.workload import Workload
from moegen.schedule.sequence import Request
from moegen.table.reader import TableReader

_STRETCHES = 4
_COMPARED = 32  # prompts of each stretch, about, whose beginnings are compared
_NEARLY_ALL = 0.9  # of the rows looked at: then the others are few enough that it does not matter what they do

Tokens = tuple[int, ...]


def table_workload(reader: TableReader, preparer: Preparer) -> tuple[Workload | None, Tokens]:
    """Prompts as the job will encode them, from up to four of the table's batches; every answer as long as it may be.

    And the tokens that nearly all of those prompts begin with. None, and no tokens, when none of those rows can run.

    Raises:
        InputError, StorageError: as reading for the job itself would.
    """
    stride = max(reader.rows // _STRETCHES, 1)

    def chosen(first_row: int, rows: int) -> bool:
        return first_row % stride + rows >= stride

    lengths: list[tuple[int, int]] = []
    prompts: list[Tokens] = []
    for batch in reader.batches(chosen):
        rows = preparer.prepare(list(enumerate(batch.values, batch.first_row)))
        requests = [row.request for row in rows if isinstance(row, Prepared)]
        lengths += map(work, requests)
        prompts += [request.token_ids for request in requests[:: max(len(requests) // _COMPARED, 1)]]
    prefix = common_prefix(prompts)
    return (Workload(reader.rows, tuple(lengths), len(prefix)) if lengths else None), prefix


def work(request: Request) -> tuple[int, int]:
    """Prompt tokens and answer tokens that take as long as this row: continuations are computed like prompts."""
    if not request.continuations:
        return len(request.token_ids), request.params.max_tokens
    return len(request.token_ids) + sum(len(tokens) - 1 for tokens in request.continuations), 1


def common_prefix(prompts: Iterable[Tokens]) -> Tokens:
    """The longest beginning that nearly all prompts have in common and go on from; empty for a single prompt.

    In sorted order, prompts that begin alike are neighbours, and the first and the last of them have no more in common
    than all between.
    """
    ordered = sorted(prompts)
    together = max(int(len(ordered) * _NEARLY_ALL + 0.5), 2)
    runs = zip(ordered, ordered[together - 1 :], strict=False)
    return max((_begun_alike(first, last) for first, last in runs), key=len, default=())


def _begun_alike(one: Tokens, other: Tokens) -> Tokens:
    both = takewhile(lambda pair: pair[0] == pair[1], zip(one[:-1], other[:-1], strict=False))
    return tuple(token for token, _ in both)

"""`_batch/<job key>/weight_cost.json`: what 8 bits cost a job's answers, measured once before its rows.

By `model.weights`, by `engine.plan.kv_dtype`, or by both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from moegen.job.prepare import Prepared, Preparer
from moegen.plan.plan import Plan
from moegen.storage import join, list_names, put_replace, read_bytes
from moegen.table.reader import TableReader

_NAME = "weight_cost.json"
_PROMPTS = 16


def known_cost(folder: str) -> dict[str, Any] | None:
    """What an earlier attempt, or this one, has measured. Raises `StorageError`."""
    if _NAME not in list_names(folder):
        return None
    found = json.loads(read_bytes(join(folder, _NAME)))
    return found if isinstance(found, dict) else None


def measure_cost(
    folder: str, model_uri: str, stored: Plan, kept: Plan, reader: TableReader, preparer: Preparer
) -> None:
    """Over the first rows that can run, unless it is known; nothing where none can.

    Raises:
        MoegenError: as loading the model does.
    """
    if known_cost(folder) is not None:
        return
    from moegen.run.weight_cost import weight_cost

    prompts = list(islice(_prompts(reader, preparer), _PROMPTS))
    if prompts:
        cost = weight_cost(model_uri, stored, kept, prompts)
        put_replace(join(folder, _NAME), json.dumps(cost.to_mapping()).encode())


def _prompts(reader: TableReader, preparer: Preparer) -> Iterator[tuple[int, ...]]:
    for batch in reader.batches(lambda first_row, rows: True):
        for row in preparer.prepare(list(enumerate(batch.values, batch.first_row))):
            if isinstance(row, Prepared):
                yield row.request.token_ids

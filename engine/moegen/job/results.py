"""The rows of a finished job as JSON lines, for clients that share no storage with the service."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moegen.storage import join
from moegen.table.inspect import part_rows


def result_lines(output_uri: str, manifest: Mapping[str, Any]) -> Iterator[bytes]:
    """One JSON object per row, in row order, with every column; what JSON has no word for is text.

    Raises:
        InputError: a part is missing or damaged.
        StorageError: storage refused.
    """
    for part in manifest["parts"]:
        for row in part_rows(join(output_uri, part["name"]), None, None):
            yield json.dumps(row, default=str, ensure_ascii=False).encode(errors="replace") + b"\n"

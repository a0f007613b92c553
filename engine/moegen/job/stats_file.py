"""`_stats.json` and `_expert_counts.arrow`: what the attempts of a job did, beside its manifest.

The names begin with `_`, as the manifest's does, so that whoever reads the folder as a table passes them over. Every
attempt that made a pass has its own entry, so a resumed job says which attempt measured what. In the table of counts
attempts are numbered from 1.
"""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from moegen.errors import InputError
from moegen.run.stats import Ints
from moegen.storage import join, list_names, put_replace, read_bytes

STATS_NAME = "_stats.json"
COUNTS_NAME = "_expert_counts.arrow"
VERSION = 1
_COUNTS_SCHEMA = pa.schema(
    [("attempt", pa.int32()), ("layer", pa.string()), ("expert", pa.int32()), ("tokens", pa.int64())]
)

log = logging.getLogger(__name__)


@dataclass
class Stats:
    """The content of both files.

    Attributes:
        fingerprint: of the work that the attempts did.
        attempts: in the order in which they began, as `_stats.json` has them.
        expert_counts: per attempt, layer -> tokens of each expert `[E]`; empty where they were not counted.
    """

    fingerprint: str
    attempts: list[dict[str, Any]] = field(default_factory=list)
    expert_counts: list[dict[str, Ints]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str) -> Stats | None:
        """None when the folder has none.

        Raises:
            InputError: a file is damaged, or of another version.
            StorageError: storage refused.
        """
        names = list_names(folder)
        if STATS_NAME not in names:
            return None
        uri = join(folder, STATS_NAME)
        try:
            values = json.loads(read_bytes(uri))
            if values["version"] != VERSION:
                raise ValueError(f"version {values['version']} where this moegen reads version {VERSION}")
            stats = cls(values["fingerprint"], values["attempts"], [{} for _ in values["attempts"]])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{uri}: is not a statistics file of this version: {error}; remove it") from error
        if COUNTS_NAME in names:
            stats._read_counts(join(folder, COUNTS_NAME))
        return stats

    def write(self, folder: str) -> None:
        """Replaces both files. Raises `StorageError` when storage refuses."""
        values = {"version": VERSION, "fingerprint": self.fingerprint, "attempts": self.attempts}
        put_replace(join(folder, COUNTS_NAME), _encoded(self._counts_table()))
        put_replace(join(folder, STATS_NAME), (json.dumps(values, allow_nan=False) + "\n").encode())

    def _counts_table(self) -> pa.Table:
        layers = [
            (attempt, layer, counts)
            for attempt, layers in enumerate(self.expert_counts, 1)
            for layer, counts in layers.items()
        ]
        sizes = [len(counts) for _, _, counts in layers]
        columns = (
            np.repeat([attempt for attempt, _, _ in layers], sizes),
            np.repeat(np.array([layer for _, layer, _ in layers], object), sizes),
            np.concatenate([np.arange(size) for size in (0, *sizes)]),
            np.concatenate([np.empty(0, np.int64), *(counts for _, _, counts in layers)]),
        )
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, _COUNTS_SCHEMA, strict=True)], _COUNTS_SCHEMA)

    def _read_counts(self, uri: str) -> None:
        try:
            rows = pa.ipc.open_file(pa.py_buffer(read_bytes(uri))).read_all().to_pydict()
            found: dict[tuple[int, str], list[int]] = {}
            for attempt, layer, tokens in zip(rows["attempt"], rows["layer"], rows["tokens"], strict=True):
                found.setdefault((attempt, layer), []).append(tokens)
            for (attempt, layer), counts in found.items():
                self.expert_counts[attempt - 1][layer] = np.array(counts, np.int64)
        except (pa.ArrowException, KeyError, IndexError) as error:
            raise InputError(f"{uri}: is not a table of expert counts: {error}; remove it") from error


def _encoded(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def earlier_stats(folder: str, fingerprint: str) -> Stats:
    """What earlier attempts at this work left in the folder; nothing where there is none that can be read."""
    try:
        found = Stats.read(folder)
    except Exception as error:
        log.warning("earlier statistics are dropped: %s", error)
        found = None
    return found if found is not None and found.fingerprint == fingerprint else Stats(fingerprint)

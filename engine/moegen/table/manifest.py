"""`_manifest.json`: the proof that every input row came out, and what the job did."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moegen.errors import InputError
from moegen.storage import join, list_names, put_replace, read_bytes, remove
from moegen.table.part import PartInfo
from moegen.table.reader import InputFile

MANIFEST_NAME = "_manifest.json"
SUCCESS_NAME = "_SUCCESS"


@dataclass(frozen=True)
class Manifest:
    """A finished job. Counts cover the whole table, timings and rates the run that finished it."""

    job_key: str
    job_name: str
    fingerprint: str
    engine_version: str
    model_digest: str
    format: str  # parquet or arrow
    rows: int
    statuses: dict[str, int]  # rows per status
    prompt_tokens: int  # each work counted once: see `dedup_rows`
    completion_tokens: int
    parts: tuple[PartInfo, ...]  # in row order
    input_files: tuple[InputFile, ...]
    resumed_rows: int  # rows that this run found in committed parts when it began
    started_at: float  # Unix time in seconds
    ended_at: float
    seconds: float
    rows_per_s: float  # rows that this run wrote, per second
    tokens_per_s: float  # tokens that this run generated, per second
    journal_rows: int = 0  # rows that this run found in the journal when it began
    dedup_rows: int = 0  # with the answer of an earlier row that asks for the same
    dedup_tokens: int = 0  # of their prompts and answers, which are in no other count
    create_only: bool = True  # whether storage honoured create-only writes; if not, names were looked for first
    weights: dict[str, Any] | None = None  # what experts or pages in 8 bits cost the answers; None: there are none

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_mapping(), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Manifest:
        """Raises `KeyError` or `TypeError` when `mapping` is not what `to_mapping` gave."""
        parts = tuple(PartInfo(**part) for part in mapping["parts"])
        files = tuple(InputFile(**file) for file in mapping["input_files"])
        return cls(**{**mapping, "parts": parts, "input_files": files})


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of an output folder; None when there is none.

    Raises:
        InputError: the file is no manifest.
        StorageError: storage refused.
    """
    if MANIFEST_NAME not in list_names(folder):
        return None
    uri = join(folder, MANIFEST_NAME)
    try:
        return Manifest.from_mapping(json.loads(read_bytes(uri)))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{uri}: is not a manifest of this version: {error}; remove it or use another folder"
        ) from error


def write_manifest(
    folder: str, manifest: Manifest, *, success: bool, register: Callable[[Manifest], object] | None = None
) -> None:
    """Writes the manifest and then, last of all, the empty `_SUCCESS`; without success an earlier one goes first.

    `register` is called with a manifest that is stored and succeeds, before anybody is told of it.
    """
    if not success:
        remove(join(folder, SUCCESS_NAME))
    put_replace(join(folder, MANIFEST_NAME), manifest.to_json().encode())
    if success:
        if register is not None:
            register(manifest)
        put_replace(join(folder, SUCCESS_NAME), b"")

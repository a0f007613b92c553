"""`_batch/<job key>/plan.json`: which work a job key stands for, written once, before its first row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import moegen
from moegen.errors import InputError, SpecError
from moegen.spec import JOB_KEY, JobSpec
from moegen.storage import join, list_below, list_names, public, put_create, read_bytes, remove
from moegen.table.fingerprint import CIRCUMSTANCES, answering
from moegen.table.reader import InputFile

BATCH_NAME = "_batch"
PLAN_NAME = "plan.json"


def batch_folder(output_uri: str, job_key: str) -> str:
    """Where a job keeps what it needs to be resumed.

    Raises:
        SpecError: the key cannot name a folder.
    """
    if not JOB_KEY.fullmatch(job_key):
        raise SpecError(
            f"job.key: {job_key!r} cannot name a folder; give 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter "
            "or a digit, or leave it out"
        )
    return join(output_uri, f"{BATCH_NAME}/{job_key}")


def clear_batch(folder: str) -> None:
    """Removes what nobody needs once every part is there: journal, marks, keys. Raises `StorageError`."""
    for name in ("journal", "attempts", "work"):
        for uri in list_below(join(folder, name)):
            remove(uri)


@dataclass(frozen=True)
class BatchPlan:
    """The work under one job key.

    Part k, the unit of commit, holds the rows [k * rows_per_part, (k + 1) * rows_per_part).
    """

    fingerprint: str
    spec: dict[str, Any]  # as given, without credentials
    model_digest: str
    tokenizer_digest: str
    input_files: tuple[InputFile, ...]  # the pins: size and version of every input object
    rows: int
    rows_per_part: int
    parts: int
    engine_version: str = moegen.__version__

    @classmethod
    def of(
        cls,
        spec: JobSpec,
        fingerprint: str,
        digests: tuple[str, str],
        input_files: Sequence[InputFile],
        rows: int,
    ) -> BatchPlan:
        """`digests`: of the model and of its tokenizer."""
        size = spec.output.rows_per_part
        files = tuple(InputFile(_public(f.uri), f.size_bytes, f.version, f.rows) for f in input_files)
        return cls(fingerprint, _public(spec.to_mapping()), *digests, files, rows, size, max(1, -(-rows // size)))

    def check(self, folder: str) -> None:
        """Refuses to go on with other work.

        Raises:
            InputError: the folder's plan is of the same specification over an input that has changed since.
            SpecError: the folder's plan is of other work.
            StorageError: storage refused.
        """
        if PLAN_NAME not in list_names(folder):
            return
        uri = join(folder, PLAN_NAME)
        earlier = _read(uri)
        if earlier.fingerprint == self.fingerprint:
            return
        remedy = "use another folder or job.key, or output.mode=new_run to start over"
        differing = [*self._differing(earlier)]
        files_differ = earlier.input_files != self.input_files
        if files_differ and not differing and earlier.spec["input"]["uri"] == self.spec["input"]["uri"]:
            raise InputError(f"{_changed(earlier.input_files, self.input_files)} changed since the job began; {remedy}")
        what = ", ".join([*differing, *["the input files"] * files_differ]) or "the engine's version"
        raise SpecError(f"output.uri: {uri} belongs to other work ({what} differ); {remedy}")

    def write(self, folder: str) -> None:
        """Once; a plan that is there stays. Raises `StorageError` when storage refuses."""
        if PLAN_NAME not in list_names(folder):
            put_create(join(folder, PLAN_NAME), (json.dumps(asdict(self), indent=2) + "\n").encode())

    def _differing(self, earlier: BatchPlan) -> Iterator[str]:
        """Names, never values: those may hold what no log should."""
        ours, theirs = _fields(self.spec), _fields(earlier.spec)
        yield from sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if self.model_digest != earlier.model_digest:
            yield "the model"
        if self.tokenizer_digest != earlier.tokenizer_digest:
            yield "its tokenizer"


_ELSEWHERE = ("input.uri", "output.uri", "output.mode", "output.iceberg")  # no part of the fingerprint


def _fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value, of what the fingerprint is made of; a field outside any section as it is."""
    found: dict[str, Any] = {}
    for section, values in spec.items():
        if section not in CIRCUMSTANCES:
            inner = values if isinstance(values, Mapping) else {"": values}
            found |= {f"{section}.{name}".rstrip("."): value for name, value in inner.items()}
    return {name: value for name, value in found.items() if name not in _ELSEWHERE} | answering(spec)


def _changed(earlier: Sequence[InputFile], now: Sequence[InputFile]) -> str:
    known = {file.uri: file for file in now}
    gone = [file.uri for file in earlier if known.get(file.uri) != file]
    more = sorted(known.keys() - {file.uri for file in earlier})
    return (gone + more)[0]


def _public(value: Any) -> Any:
    """The same without user names, passwords and query strings in URIs, which may sign a request."""
    if isinstance(value, Mapping):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return public(value) if isinstance(value, str) and "://" in value else value


def _read(uri: str) -> BatchPlan:
    try:
        values = json.loads(read_bytes(uri))
        return BatchPlan(**{**values, "input_files": tuple(InputFile(**file) for file in values["input_files"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri}: is not a plan of this version: {error}; use another folder or job.key") from error

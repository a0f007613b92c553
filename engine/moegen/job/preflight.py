"""What can be found out about a job before any device time: is there an input, a model, and room for the output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moegen.errors import InputError, MoegenError
from moegen.job.prepare import needed_columns
from moegen.job.records import work_of
from moegen.shape import ModelShape
from moegen.spec import JobSpec
from moegen.storage import StoredObject, join, list_below, list_names, read_bytes
from moegen.table.batch_plan import BATCH_NAME, PLAN_NAME
from moegen.table.manifest import MANIFEST_NAME
from moegen.table.part import is_part_name
from moegen.table.reader import TableReader, input_objects

_LOOK_ROWS = 1024  # read to see whether there are rows, and their columns; text tables have no footer to ask


@dataclass(frozen=True)
class Preflight:
    """`fingerprint` names the work: it changes with the content of the input, not with who asks or where it runs."""

    fingerprint: str  # 64 hexadecimal digits
    files: int  # of the input
    size_bytes: int  # of all of them
    output: Literal["free", "ours", "other"]  # empty, or to be cleared; with parts of this work; with other parts
    output_detail: str | None  # what to do about others' parts


def preflight(spec: JobSpec) -> Preflight:
    """Looks at storage only: no engine, no tokenizer, a few rows of the input at most.

    Raises:
        SpecError: a column that the job needs does not exist, or the model is one that is not run.
        InputError: there is no input, or no row in it; or no checkpoint.
        StorageError: storage refused.
    """
    ModelShape.read(spec.model.uri)
    objects = input_objects(spec.input)
    _check_rows(spec)
    work = json.dumps([work_of(spec), [[o.uri, o.size_bytes, o.version] for o in objects]])
    output, detail = _output(spec, objects)
    fingerprint = hashlib.sha256(work.encode()).hexdigest()
    return Preflight(fingerprint, len(objects), sum(o.size_bytes for o in objects), output, detail)


def _check_rows(spec: JobSpec) -> None:
    # Carried columns may be in some files only, so that the first rows say nothing about them; needed ones may not.
    limit = _LOOK_ROWS if spec.input.limit is None else min(spec.input.limit, _LOOK_ROWS)
    look = replace(spec.input, columns=(), id_column=None, limit=limit)
    if TableReader(look, needed_columns(spec)).rows == 0:
        uris = ", ".join(spec.input.uris)
        raise InputError(f"input.uri: no row in {uris}; wait for the table to be written, or skip the job")


def _output(spec: JobSpec, objects: Sequence[StoredObject]) -> tuple[Literal["free", "ours", "other"], str | None]:
    taken = [name for name in list_names(spec.output.uri) if is_part_name(name) or name == MANIFEST_NAME]
    if spec.output.mode == "new_run" or not taken:
        return "free", None
    if any(_same_work(plan, spec, objects) for plan in _plans(spec.output.uri)):
        return "ours", None
    return "other", (
        f"output.uri: {join(spec.output.uri, taken[0])} belongs to other work (another input, prompt, model, sampling "
        "or output format); use another folder, or output.mode=new_run to remove it"
    )


def _plans(output_uri: str) -> list[dict[str, Any]]:
    uris = [uri for uri in list_below(join(output_uri, BATCH_NAME)) if uri.endswith(f"/{PLAN_NAME}")]
    plans = []
    for uri in uris:
        try:
            plans.append(json.loads(read_bytes(uri)))
        except ValueError:  # not one of ours: it proves nothing
            continue
    return plans


def _same_work(plan: dict[str, Any], spec: JobSpec, objects: Sequence[StoredObject]) -> bool:
    """Whether a plan is of this work, but for where tables lie; a limited job has pinned the first files only."""
    try:
        planned = JobSpec.from_mapping(plan["spec"])
        files = {(file["uri"], file["size_bytes"], file["version"]) for file in plan["input_files"]}
    except (MoegenError, LookupError, TypeError):  # of another version
        return False
    there = {(o.uri, o.size_bytes, o.version) for o in objects}
    whole = files <= there if spec.input.limit is not None else files == there
    return whole and _placeless(planned) == _placeless(spec)


def _placeless(spec: JobSpec) -> str:
    return work_of(replace(spec, input=replace(spec.input, uri="in"), output=replace(spec.output, uri="out")))

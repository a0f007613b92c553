"""What makes two runs the same work: everything that can change an output part, in one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moegen.spec import JobSpec
from moegen.table.reader import InputFile

_VERSION = 2  # raise when parts written by earlier engines must not be continued

CIRCUMSTANCES = ("job", "engine", "checkpoint", "errors", "limits")  # sections that change no answer


def answering(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of them does nevertheless, by its name; nothing where it is as usual."""
    kv_dtype = spec["engine"]["plan"].get("kv_dtype", "auto")
    return {} if kv_dtype == "auto" else {"engine.plan.kv_dtype": kv_dtype}


def fingerprint(spec: JobSpec, model_digest: str, tokenizer_digest: str, files: Sequence[InputFile]) -> str:
    """64 hexadecimal digits over specification, model, tokenizer and input files.

    Left out is what cannot change an answer: who asked (`job`), where it runs (`engine`, but for what is `answering`),
    how often it is saved (`checkpoint`), when it ends early (`errors`, `limits`), where it goes (`output.uri`,
    `output.mode`, `output.iceberg`) and how the input was named (`input.uri`; the files it led to are in).
    """
    mapping = spec.to_mapping()
    for section, names in (("input", ("uri",)), ("output", ("uri", "mode", "iceberg"))):
        mapping[section] = {name: value for name, value in mapping[section].items() if name not in names}
    work = {
        "version": _VERSION,
        "spec": {name: value for name, value in mapping.items() if name not in CIRCUMSTANCES} | answering(mapping),
        "model": model_digest,
        "tokenizer": tokenizer_digest,
        "files": [[file.uri, file.size_bytes, file.version] for file in files],
    }
    return hashlib.sha256(json.dumps(work, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

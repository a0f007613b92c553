"""The job specification that an operator's parameters mean, and the key that names the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moegen_airflow.exceptions import MoegenInputError

_PLAIN_FIELDS = {"task", "output_schema", "choices", "regex"}  # of the specification, beside its sections
_PROMPT_WAYS = {"column", "messages_column", "template", "token_ids_column"}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None: defaults are the engine's to fill in."""
    return {name: value for name, value in fields.items() if value is not None}


def completed(spec: dict[str, Any]) -> dict[str, Any]:
    """With the default that is the provider's own, the prompt's column.

    Raises:
        MoegenInputError: a section that is no mapping, no `max_tokens`, or something that JSON has no word for.
    """
    for section, value in spec.items():
        if section not in _PLAIN_FIELDS:
            require_mapping(f"job_params: {section}", value)
    if "max_tokens" not in spec["sampling"]:
        raise MoegenInputError(
            f"sampling_params: {spec['sampling']!r} has no max_tokens; give the longest answer's number of tokens"
        )
    if not spec["prompt"].keys() & _PROMPT_WAYS:
        spec["prompt"]["column"] = "prompt"
    try:
        json.dumps(spec, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MoegenInputError(f"the job specification is not JSON: {error}; use plain values in it") from error
    return spec


def plain_uris(uris: object) -> object:
    """XCom hands over lists of its own."""
    return list(uris) if isinstance(uris, Sequence) and not isinstance(uris, str) else uris


def plain_schema(schema: Any) -> Any:
    """A JSON Schema; of a Pydantic model, the one that it has."""
    make = getattr(schema, "model_json_schema", None)
    return make() if callable(make) else schema


def row_rules(max_failed_rows: float | None) -> dict[str, Any]:
    """The section `errors`: a whole number counts rows, a fraction is a share of them.

    Raises:
        MoegenInputError: neither of the two.
    """
    match max_failed_rows:
        case None:
            return {}
        case bool():
            pass
        case int() if max_failed_rows >= 0:
            return {"max_failed_rows": max_failed_rows, "max_error_rate": 1.0}
        case float() if 0 <= max_failed_rows <= 1:
            return {"max_error_rate": max_failed_rows}
    raise MoegenInputError(
        f"max_failed_rows: {max_failed_rows!r} cannot be used; give a number of rows (10) or a share of them (0.01)"
    )


def require_mapping(name: str, value: object) -> None:
    """Raises `MoegenInputError` when `value` is not a mapping."""
    if not isinstance(value, Mapping):
        raise MoegenInputError(f"{name}: {value!r} is not a mapping; give a dict")


def truth(name: str, value: object) -> bool:
    """A flag that may have been templated, and so be text. Raises `MoegenInputError`."""
    flags = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False, "": False}
    if (text := str(value).strip().lower()) not in flags:
        raise MoegenInputError(f"{name}: {value!r} is neither true nor false")
    return flags[text]


def job_key(dag_id: str, task_id: str, run_id: str, fingerprint: str, rerun: int | None = None) -> str:
    """Names the work, never the attempt: the same for every try and for every map index with this fingerprint.

    `rerun`: which round of a task that is told to run again whatever is there; its tries share the round.
    """
    parts = (dag_id, task_id, run_id, fingerprint, *(() if rerun is None else (f"rerun {rerun}",)))
    # Letters first: a key of digits would become a number in native templates.
    return f"airflow-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:40]}"

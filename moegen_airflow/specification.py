"""The job specification that an operator's parameters mean, and the key that names the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moegen_airflow.exceptions import MoegenInputError


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


def job_key(dag_id: str, task_id: str, run_id: str, spec: Mapping[str, Any]) -> str:
    """Names the work, never the attempt: the same for every try and for every map index with this specification.

    Raises:
        MoegenInputError: `spec` holds something that JSON has no word for.
    """
    try:
        canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MoegenInputError(f"the job specification is not JSON: {error}; use plain values in it") from error
    digest = hashlib.sha256("\0".join((dag_id, task_id, run_id, canonical)).encode()).hexdigest()
    # Letters first: a key of digits would become a number in native templates.
    return f"airflow-{digest[:40]}"

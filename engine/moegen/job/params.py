"""A row's own sampling parameters over the job's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moegen.errors import SpecError
from moegen.job.prompts import Refused, Row, parsed
from moegen.row import RowError, Status
from moegen.spec import JobSampling, Sampling


def row_params(sampling: JobSampling, row: Row) -> Sampling:
    """The job's parameters with those that the row brings: `params_column` first, `param_columns` over it.

    Raises:
        Refused: with status `invalid_params`, when the row's own cannot be used.
    """
    try:
        own = _own_params(sampling, row)
        return sampling.params.override(own) if own else sampling.params
    except SpecError as error:
        raise Refused(Status.INVALID_PARAMS, RowError("invalid_params", str(error), "params")) from None


def _own_params(sampling: JobSampling, row: Row) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if sampling.params_column is not None:
        own.update(_mapping(row.get(sampling.params_column), sampling.params_column))
    own.update({name: row.get(name) for name in sampling.param_columns if row.get(name) is not None})
    return {name: _number_from_text(name, value) for name, value in own.items()}


def _mapping(value: Any, column: str) -> Mapping[str, Any]:
    value = parsed(value) if value != "" else None
    if value is not None and not isinstance(value, dict):
        kind = type(value).__name__
        raise SpecError(f"column {column!r} holds a value of type {kind}; parameters are a mapping, or it as JSON text")
    return value or {}


def _number_from_text(name: str, value: Any) -> Any:
    """CSV has only text: "16", "0.7", "true" and "[1, 2]" are what they say; an empty field says nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    said = parsed(value)
    return said if name != "stop" or isinstance(said, list) else value

"""What can become of one row of the table: its status, its error, its result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The `status` column. Every input row ends with exactly one of these."""

    OK = "ok"
    LENGTH = "length"  # the answer was cut at max_tokens
    SKIPPED_NULL = "skipped_null"  # no prompt: null, or nothing left of it
    TOO_LONG = "too_long"  # prompt + max_tokens exceed the model's context or the KV pool
    INVALID_PARAMS = "invalid_params"  # this row's own sampling parameters cannot be used
    ERROR = "error"  # anything else; `error` says what
    QUARANTINED = "quarantined"  # the engine crashed with this row in it, again and again, at last with it alone

    @property
    def failed(self) -> bool:
        """Whether the row counts against `errors.max_error_rate`."""
        return self not in (Status.OK, Status.LENGTH, Status.SKIPPED_NULL)


@dataclass(frozen=True, slots=True)
class RowError:
    """The `error` column: why a row has no answer.

    `stage` is where it happened: `read`, `prompt`, `params`, `admit`, `generate`.
    `retryable` says whether the same row could succeed in another run without being changed.
    """

    code: str
    message: str
    stage: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class RowResult:
    """Everything that the engine adds to one input row (the table's own columns are carried beside it).

    `output` is set only when `status` is `ok`, or `length` when the job asks to keep cut answers;
    a cut answer's text is always in `output_raw`.
    """

    row_index: int  # ordinal of the row over all input files
    status: Status
    output: str | None = None
    output_raw: str | None = None
    error: RowError | None = None
    finish_reason: str | None = None  # "stop" (end token, stop token or stop string) or "length"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    attempts: int = 0  # how often it entered the engine: 1, and once more for every crash with it in flight
    seed: int | None = None
    input_truncated: bool = False
    token_ids: tuple[int, ...] | None = None  # generated ids, when output.include asks for them
    prompt_rendered: str | None = None  # the text that was encoded, when output.include asks for it

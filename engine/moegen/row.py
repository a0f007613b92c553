"""What can become of one row of the table: its status, its error, its result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """The `status` column. Every input row ends with exactly one of these."""

    OK = "ok"
    LENGTH = "length"  # the answer was cut at max_tokens
    INVALID_OUTPUT = "invalid_output"  # the answer ended, but is not what the job asked for; kept in `output_raw`
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


Text = str | tuple[str | None, ...] | None  # one answer's, or one for each of several


@dataclass(frozen=True, slots=True)
class RowResult:
    """Everything that the engine adds to one input row (the table's own columns are carried beside it).

    `output` is set only when `status` is `ok`, or `length` when the job asks to keep cut answers;
    the text of an answer that was cut or is invalid is always in `output_raw`.

    Where a row has several answers (`sampling.n`), `output`, `output_json`, `output_raw`, `finish_reason`, `token_ids`
    and `logprobs` are tuples with an entry for each, to which the rule above applies; `status` and `error` are those
    of the worst.
    """

    row_index: int  # ordinal of the row over all input files
    status: Status
    output: Text = None
    output_raw: Text = None
    error: RowError | None = None
    finish_reason: Text = None  # "stop" (end token, stop token or stop string) or "length"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None  # of all answers
    dedup_of: int | None = None  # the first row that asks for the same, whose answer this is
    attempts: int = (
        0  # how often it entered the engine: 1 unless dedup_of is set, and once more for every crash with it
    )
    seed: int | None = None
    input_truncated: bool = False
    token_ids: tuple[Any, ...] | None = None  # generated ids, when output.include asks for them
    prompt_rendered: str | None = None  # the text that was encoded, when output.include asks for it
    output_json: Any = None  # the answer as a value of the type that its schema means
    logprobs: tuple[Any, ...] | None = None  # one mapping per generated token, when sampling.logprobs asks for them
    label: str | None = None  # task classify: the likeliest choice
    label_prob: float | None = None
    label_probs: tuple[float, ...] | None = None  # of every choice; they sum to 1
    score: float | None = None  # task score: the continuation's log-likelihood in nats
    score_tokens: int | None = None  # how many tokens it has

"""The errors that the provider raises on purpose, as one tree. Those marked * are not retried: it could not help.

MoegenError
|-- MoegenInputError*           the request can never succeed as written
|-- MoegenStaleInputError*      the task has a job over another input, and `on_stale_input` is "fail"
|-- MoegenJobNotFoundError      the service has no job under this key
|-- MoegenJobFailedError        the job ended in failure; a retry resumes it
|-- MoegenPartialFailureError*  more rows failed than the job allows
|-- MoegenJobCancelledError     somebody cancelled the job; a retry resumes it
|-- MoegenTimeoutError*         the job did not end in time; the clock is kept over retries
|-- MoegenQueueTimeoutError     the job did not get the device in time
|-- MoegenUnavailableError      the service cannot be reached or cannot answer now
`-- MoegenTriggerEventError     the trigger's event is not one that this provider version sends
"""

from __future__ import annotations

from http import HTTPStatus

from airflow.sdk.exceptions import AirflowException, AirflowFailException


class MoegenError(AirflowException):
    """Base of the tree."""


class MoegenInputError(MoegenError, AirflowFailException):
    """A parameter, a connection, a table, a model or a token that the service refuses; retrying cannot help."""


class MoegenStaleInputError(MoegenError, AirflowFailException):
    """The input or a parameter has changed since this task submitted its job, and it was told to fail then."""


class MoegenJobNotFoundError(MoegenError):
    """The service knows no job under this key."""

    status_code = HTTPStatus.NOT_FOUND  # by which common-ai's operator tells it from other errors


class MoegenJobFailedError(MoegenError):
    """The job ended in failure. What it committed stays, and submitting it again resumes it."""


class MoegenPartialFailureError(MoegenError, AirflowFailException):
    """More rows failed than the job allows. What it committed stays; with a larger `max_failed_rows` it goes on."""


class MoegenJobCancelledError(MoegenError):
    """The job was cancelled. What it committed stays, and submitting it again resumes it."""


class MoegenTimeoutError(MoegenError, AirflowFailException):
    """The job did not end within the operator's `timeout`, which retries share; clearing the task begins it anew."""


class MoegenQueueTimeoutError(MoegenError):
    """The job was still waiting for the device after the operator's `queue_timeout`. A retry queues it again."""


class MoegenUnavailableError(MoegenError):
    """No usable answer: connection refused or reset, a request timeout, HTTP 429 or 5xx, a body that is not ours."""


class MoegenTriggerEventError(MoegenError):
    """An event that lacks what the resumed task needs."""

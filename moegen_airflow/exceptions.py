"""The errors that the provider raises on purpose, as one tree.

MoegenError
|-- MoegenInputError          the request can never succeed as written; the task fails without a retry
|-- MoegenJobNotFoundError    the service has no job under this key
|-- MoegenJobFailedError      the job ended in failure; a retry resumes it
|-- MoegenJobCancelledError   somebody cancelled the job; a retry resumes it
|-- MoegenTimeoutError        the job did not end in time
|-- MoegenUnavailableError    the service cannot be reached or cannot answer now
`-- MoegenTriggerEventError   the trigger's event is not one that this provider version sends
"""

from __future__ import annotations

from airflow.sdk.exceptions import AirflowException, AirflowFailException


class MoegenError(AirflowException):
    """Base of the tree."""


class MoegenInputError(MoegenError, AirflowFailException):
    """A parameter, a connection, a specification or a token that the service refuses; retrying cannot help."""


class MoegenJobNotFoundError(MoegenError):
    """The service knows no job under this key."""


class MoegenJobFailedError(MoegenError):
    """The job ended in failure. What it committed stays, and submitting it again resumes it."""


class MoegenJobCancelledError(MoegenError):
    """The job was cancelled. What it committed stays, and submitting it again resumes it."""


class MoegenTimeoutError(MoegenError):
    """The job did not end within the operator's `timeout`."""


class MoegenUnavailableError(MoegenError):
    """No usable answer: connection refused or reset, a request timeout, HTTP 429 or 5xx, a body that is not ours."""


class MoegenTriggerEventError(MoegenError):
    """An event that lacks what the resumed task needs."""

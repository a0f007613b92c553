"""Patience with S3 endpoints: which failures are passing ones.

botocore sends a request up to five times after 500, 502, 503, 504, throttling, and connections that fail or fall silent
(5 s for connecting, 15 s for each read), with random waits that double up to 8 s; `AWS_MAX_ATTEMPTS` and
`AWS_RETRY_MODE` change that. s3fs asks botocore up to five times in turn, also where an answer's body breaks off, but
gives up at once after some errors that `_passes` adds. An endpoint may so be away for about half a minute.
"""

from __future__ import annotations

from functools import cache

_PASSING_CODES = ("ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "TooManyRequests")
_NOT_IMPLEMENTED = 501


@cache
def be_patient() -> None:
    """From now on s3fs tries again after every failure that may pass, in this process."""
    import s3fs.core

    s3fs.core.set_custom_error_handler(_passes)


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed a little later: s3fs asks about what it would give up on."""
    import aiohttp
    from botocore.exceptions import ClientError, ConnectionError, IncompleteReadError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code")
        return code in _PASSING_CODES or (status >= 500 and status != _NOT_IMPLEMENTED)
    return isinstance(error, (ConnectionError, IncompleteReadError, aiohttp.ClientError, ConnectionResetError))

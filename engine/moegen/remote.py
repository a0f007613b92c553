"""What moegen asks of the libraries behind fsspec beyond their defaults: patience on S3, no redirects to other hosts.

**Patience.** botocore sends a request up to five times after 500, 502, 503, 504, throttling, and connections that fail
or fall silent (5 s for connecting, 15 s for each read), with random waits that double up to 8 s; `AWS_MAX_ATTEMPTS` and
`AWS_RETRY_MODE` change that. s3fs asks botocore up to five times in turn, also where an answer's body breaks off, but
gives up at once after some errors that `_passes` adds. An endpoint may so be away for about half a minute.

**Redirects.** A server that a job may read from could send the reader on to one that it may not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from fsspec.config import conf

from moegen.errors import InputError

_PASSING_CODES = ("ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "TooManyRequests")
_NOT_IMPLEMENTED = 501


def options(scheme: str) -> dict[str, Any]:
    """What fsspec is to be given for the filesystem of a scheme, whose library is set up on the way."""
    if scheme in ("s3", "s3a"):
        _be_patient()
    if scheme not in ("http", "https"):
        return {}
    settings = conf.get(scheme, {}).get("client_kwargs", {})  # a person's own, which ours would replace
    return {"client_kwargs": {**settings, "trace_configs": _guards()}}


@cache
def _be_patient() -> None:
    try:
        import s3fs.core
    except ImportError:  # fsspec says how to install it
        return
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


@cache
def _guards() -> list[Any]:
    try:
        import aiohttp
    except ImportError:
        return []
    guard = aiohttp.TraceConfig()
    guard.on_request_redirect.append(_check_redirect)
    guard.freeze()
    return [guard]


async def _check_redirect(session: Any, context: Any, redirect: Any) -> None:
    from yarl import URL

    headers = redirect.response.headers
    target = redirect.url.join(URL(headers.get("Location") or headers.get("URI") or ""))
    if target.origin() != redirect.url.origin():
        raise InputError(
            f"{redirect.url.with_query(None)}: redirects to {target.host}, another host, which is not followed; "
            "give the address where the file is"
        )

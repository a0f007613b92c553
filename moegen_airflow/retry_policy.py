"""How a task with `retries` goes on after each error of this provider."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

from moegen_airflow.exceptions import (
    MoegenInputError,
    MoegenPartialFailureError,
    MoegenQueueTimeoutError,
    MoegenStaleInputError,
    MoegenTimeoutError,
    MoegenUnavailableError,
)

MOEGEN_RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        # Airflow never retries these anyway; a policy that is read alone should say so.
        RetryRule(
            exception=[MoegenInputError, MoegenStaleInputError, MoegenPartialFailureError, MoegenTimeoutError],
            action=RetryAction.FAIL,
            reason="the same request would end the same way",
        ),
        RetryRule(
            exception=MoegenUnavailableError,
            retry_delay=timedelta(seconds=30),
            reason="the service could not be reached; the retry attaches to the job",
        ),
        RetryRule(
            exception=MoegenQueueTimeoutError,
            retry_delay=timedelta(minutes=5),
            reason="the device is busy; the retry queues the job again",
        ),
    ]
)
"""`retry_policy=MOEGEN_RETRY_POLICY`: bad input fails at once, a service that cannot be reached is tried again after
30 seconds, a busy device after 5 minutes, anything else after the task's own `retry_delay`."""

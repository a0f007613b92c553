from __future__ import annotations

from datetime import timedelta

import pytest
from airflow.sdk import DAG, RetryAction
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy

from moegen_airflow import exceptions
from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.retry_policy import MOEGEN_RETRY_POLICY


@pytest.mark.parametrize(
    ("error", "action", "delay"),
    [
        (exceptions.MoegenInputError, RetryAction.FAIL, None),
        (exceptions.MoegenStaleInputError, RetryAction.FAIL, None),
        (exceptions.MoegenPartialFailureError, RetryAction.FAIL, None),
        (exceptions.MoegenTimeoutError, RetryAction.FAIL, None),
        (exceptions.MoegenUnavailableError, RetryAction.RETRY, timedelta(seconds=30)),
        (exceptions.MoegenQueueTimeoutError, RetryAction.RETRY, timedelta(minutes=5)),
        (exceptions.MoegenJobFailedError, RetryAction.DEFAULT, None),
        (ValueError, RetryAction.DEFAULT, None),
    ],
)
def test_what_each_error_means(error, action, delay):
    for policy in (MOEGEN_RETRY_POLICY, ExceptionRetryPolicy.deserialize(MOEGEN_RETRY_POLICY.serialize())):
        decision = policy.evaluate(error("why"), try_number=1, max_tries=3)
        assert (decision.action, decision.retry_delay) == (action, delay)


def test_a_task_takes_it():
    with DAG("d", schedule=None):
        task = MoegenBatchOperator(
            task_id="t", input_uri="a", output_uri="b", sampling_params={}, retries=3, retry_policy=MOEGEN_RETRY_POLICY
        )
    assert task.retry_policy is MOEGEN_RETRY_POLICY

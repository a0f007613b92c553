"""Dags of test_standalone.py: copied into the dags folder of the Airflow that it starts."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

from airflow.sdk import DAG

from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.sensor import MoegenBatchSensor

URIS = {
    "input_uri": "{{ params.input_uri }}",
    "output_uri": "{{ params.output_uri }}/{{ task.task_id }}",
    "model_id": "{{ params.model_uri }}",
}
PARAMS = {"input_uri": "", "output_uri": "", "model_uri": ""}
SHORT = {"max_tokens": 8}
LONG = {"max_tokens": 400, "ignore_eos": True}


class DiesAfterSubmit(MoegenBatchOperator):
    """The first attempt's process is killed while it waits."""

    def _look(self, poll):
        if self._owner == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._look(poll)


with DAG("e2e_modes", schedule=None, params=PARAMS):
    common = {"prompt_column": "text", "sampling_params": SHORT, "poll_interval": 0.5, **URIS}
    waits = MoegenBatchOperator(task_id="waits", **common)
    defers = MoegenBatchOperator(task_id="defers", deferrable=True, **common)
    ended = "{{ ti.xcom_pull('defers')['job_key'] }}"
    waits >> defers >> MoegenBatchSensor(task_id="watched", job_key=ended, poke_interval=1, timeout=120)

with DAG("e2e_retry", schedule=None, params=PARAMS):
    DiesAfterSubmit(
        task_id="dies_once",
        prompt_column="text",
        sampling_params=SHORT,
        poll_interval=0.5,
        retries=1,
        retry_delay=timedelta(seconds=1),
        **URIS,
    )

for mode in ("waiting", "deferred"):
    with DAG(f"e2e_{mode}", schedule=None, params=PARAMS):
        MoegenBatchOperator(
            task_id="long",
            prompt_column="text",
            sampling_params=LONG,
            poll_interval=0.5,
            deferrable=mode == "deferred",
            **URIS,
        )

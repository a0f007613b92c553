"""Dags of test_standalone.py: copied into the dags folder of the Airflow that it starts."""

from __future__ import annotations

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


with DAG("e2e_modes", schedule=None, params=PARAMS):
    common = {"prompt_column": "text", "sampling_params": SHORT, "poll_interval": 0.5, **URIS}
    waits = MoegenBatchOperator(task_id="waits", **common)
    defers = MoegenBatchOperator(task_id="defers", deferrable=True, **common)
    ended = "{{ ti.xcom_pull('defers')['job_key'] }}"
    waits >> defers >> MoegenBatchSensor(task_id="watched", job_key=ended, poke_interval=1, timeout=120)

"""Dags of test_examples.py: copied into the dags folder of the Airflow that it starts."""

from __future__ import annotations

import json
from pathlib import Path

from airflow.sdk import DAG, task

from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.sensor import MoegenBatchSensor

PARAMS = {"input_uri": "", "output_uri": "", "model_uri": "", "shards": ""}
COMMON = {
    "model_id": "{{ params.model_uri }}",
    "prompt_column": "text",
    "sampling_params": {"max_tokens": 8},
    "poll_interval": 0.5,
}

with DAG("example_modes", schedule=None, params=PARAMS):
    uris = {"input_uri": "{{ params.input_uri }}", "output_uri": "{{ params.output_uri }}/{{ task.task_id }}"}
    waits = MoegenBatchOperator(task_id="waits", **uris, **COMMON)
    defers = MoegenBatchOperator(task_id="defers", deferrable=True, **uris, **COMMON)
    ended = "{{ ti.xcom_pull('defers')['job_key'] }}"
    waits >> defers >> MoegenBatchSensor(task_id="watched", job_key=ended, poke_interval=1, timeout=120)

with DAG("example_shards", schedule=None, params=PARAMS):

    @task
    def listed(params: dict) -> list[dict[str, str]]:
        """As `moegen_shards` deals shards out, but by a list that can be changed between two clears."""
        return json.loads(Path(params["shards"]).read_text())

    MoegenBatchOperator.partial(task_id="answer", deferrable=True, **COMMON).expand_kwargs(listed())

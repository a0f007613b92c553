"""A Dag for every night of nights.py: copied with it into the dags folder of the Airflow that the tests start."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from nights import PLAYED, QUICK, TASK, Night

from moegen_airflow.operator import MoegenBatchOperator

PARAMS = {"input_uri": "", "output_uri": "", "model_uri": "", "service": ""}


def task(night: Night) -> None:
    own = dict(night.task)
    if seconds := own.pop("execution_timeout_s", None):
        own["execution_timeout"] = timedelta(seconds=seconds)
    MoegenBatchOperator(
        task_id=TASK,
        input_uri="{{ params.input_uri }}",
        output_uri="{{ params.output_uri }}",
        model_id="{{ params.model_uri }}",
        moegen_conn_id="{{ params.service }}",
        deferrable=night.deferrable,
        retry_delay=timedelta(seconds=own.pop("retry_delay_s", 1)),
        **QUICK | own,
    )


for night in [night for night in PLAYED if not night.after]:
    with DAG(night.dag_id, schedule=None, params=PARAMS):
        task(night)

"""A job that one Dag submits and another waits for: the second gets the job's key in its `conf`.

`moegen_submit` is done as soon as the job is queued: nothing that happens to it afterwards concerns the job. The sensor
of `moegen_watch` only watches.
"""

from __future__ import annotations

import os
from pathlib import Path

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, Param

from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.sensor import MoegenBatchSensor

DEMO_DIR = Path(os.environ.get("MOEGEN_DEMO_DIR") or Path(__file__).resolve().parents[1] / "demo")

with DAG(
    "moegen_submit",
    description="Queues a job, hands its key over and is done",
    schedule=None,
    tags=["moegen"],
    params={
        "input_uri": Param(str(DEMO_DIR / "tickets.parquet"), type="string", description="The table to read"),
        "output_uri": Param(None, type=["null", "string"], description="The folder to write"),
    },
    user_defined_macros={"demo_output": str(DEMO_DIR / "run" / "output")},
):
    submit = MoegenBatchOperator(
        task_id="submit",
        input_uri="{{ params.input_uri }}",
        output_uri="{{ params.output_uri or demo_output ~ '/' ~ run_id }}",
        model_id=str(DEMO_DIR / "model"),
        prompt_column="text",
        sampling_params={"max_tokens": 32},
        job_params={"prompt": {"chat": True}},
        wait_for_completion=False,
    )
    submit >> TriggerDagRunOperator(
        task_id="hand_over", trigger_dag_id="moegen_watch", conf={"job_key": "{{ ti.xcom_pull('submit') }}"}
    )

with DAG(
    "moegen_watch",
    description="Waits for a job of another Dag",
    schedule=None,
    tags=["moegen"],
    params={"job_key": Param(type="string", description="What the submitting task returned")},
):
    MoegenBatchSensor(
        task_id="wait", job_key="{{ params.job_key }}", deferrable=True, poke_interval=2, timeout=12 * 3600
    )

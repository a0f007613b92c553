"""A sample, a look by a person, then the whole table. The approval waits on no worker and in no triggerer.

Sample and full run have folders of their own: with another `input.limit` they are different work. Rejected, the full
run is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param

from moegen_airflow.operator import MoegenBatchOperator

DEMO_DIR = Path(os.environ.get("MOEGEN_DEMO_DIR") or Path(__file__).resolve().parents[1] / "demo")

with DAG(
    "moegen_approval",
    description="100 rows, an approval, all rows",
    schedule=None,
    tags=["moegen"],
    params={
        "input_uri": Param(str(DEMO_DIR / "tickets.parquet"), type="string", description="The table to read"),
        "model_uri": Param(str(DEMO_DIR / "model"), type="string", description="The checkpoint folder"),
        "output_uri": Param(None, type=["null", "string"], description="Folder of both outputs"),
        "sample_rows": Param(100, type="integer", minimum=1, description="Rows to look at first"),
        "max_tokens": Param(32, type="integer", minimum=1, description="Longest answer, in tokens"),
    },
    user_defined_macros={"demo_output": str(DEMO_DIR / "run" / "output")},
    render_template_as_native_obj=True,  # numbers arrive as numbers
):
    output_uri = "{{ params.output_uri or demo_output ~ '/' ~ run_id }}"
    job = {
        "input_uri": "{{ params.input_uri }}",
        "model_id": "{{ params.model_uri }}",
        "prompt_column": "text",
        "sampling_params": {"max_tokens": "{{ params.max_tokens }}"},
        "deferrable": True,
        "poll_interval": 2,
    }
    sample = MoegenBatchOperator(
        task_id="sample",
        output_uri=f"{output_uri}/sample",
        job_params={"prompt": {"chat": True}, "input": {"limit": "{{ params.sample_rows }}"}},
        **job,
    )
    approve = ApprovalOperator(
        task_id="approve",
        subject="Run the whole table {{ params.input_uri }}?",
        body="{{ ti.xcom_pull('sample')['rows'] }} rows: {{ ti.xcom_pull('sample')['statuses'] }}. "
        f"Read them in {output_uri}/sample before you decide.",
    )
    everything = MoegenBatchOperator(
        task_id="everything", output_uri=f"{output_uri}/all", job_params={"prompt": {"chat": True}}, **job
    )
    sample >> approve >> everything

"""One table of prompts in, one table of answers out: an operator that does not wait, a sensor that does.

The defaults run the demo: `MOEGEN_DEMO_DIR` names the demo folder, with `tickets.parquet` and `model` in it.
A run may name its own: `airflow dags trigger moegen_table --conf '{"input_uri": "s3://…", "output_uri": "s3://…"}'`.
"""

from __future__ import annotations

import os
from pathlib import Path

from airflow.sdk import DAG, Param, task

from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.sensor import MoegenBatchSensor

DEMO_DIR = Path(os.environ.get("MOEGEN_DEMO_DIR") or Path(__file__).resolve().parents[1] / "demo")


@task
def check_rows(manifest: dict) -> dict[str, int]:
    """Rows in = rows out: every input row has one output row, with an answer or a status that says why not."""
    rows, statuses = manifest["rows"], manifest["statuses"]
    written = sum(part["rows"] for part in manifest["parts"])
    if not rows == written == sum(statuses.values()):
        raise ValueError(f"{rows} rows in, {written} rows out, statuses {statuses}: rows were lost or doubled")
    print(f"{rows} rows in, {written} rows out: {statuses}")
    return statuses


with DAG(
    "moegen_table",
    description="A table of prompts through a Mixture-of-Experts model",
    schedule=None,
    tags=["moegen"],
    params={
        "input_uri": Param(str(DEMO_DIR / "tickets.parquet"), type="string", description="The table to read"),
        "model_uri": Param(str(DEMO_DIR / "model"), type="string", description="The checkpoint folder"),
        "output_uri": Param(
            None, type=["null", "string"], description="The folder to write; empty: a new one in the demo folder"
        ),
        "max_tokens": Param(32, type="integer", minimum=1, description="Longest answer, in tokens"),
    },
    user_defined_macros={"demo_output": str(DEMO_DIR / "run" / "output")},
    render_template_as_native_obj=True,  # max_tokens arrives as a number
) as dag:
    submit = MoegenBatchOperator(
        task_id="submit",
        input_uri="{{ params.input_uri }}",
        model_id="{{ params.model_uri }}",
        output_uri="{{ params.output_uri or demo_output ~ '/' ~ run_id }}",
        prompt_column="text",
        sampling_params={"max_tokens": "{{ params.max_tokens }}"},
        job_params={"prompt": {"chat": True}},
        wait_for_completion=False,
    )
    wait = MoegenBatchSensor(task_id="wait", job_key=submit.output, deferrable=True, poke_interval=2, timeout=3600)
    check_rows(wait.output)

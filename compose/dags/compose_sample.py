"""The demo's tickets from the compose S3 store through the demo's model, answers back into the store."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param, task

from moegen_airflow.operator import MoegenBatchOperator


@task
def check_rows(manifest: dict) -> dict[str, int]:
    """Rows in = rows out: every input row has one output row, with an answer or a status that says why not."""
    written = sum(part["rows"] for part in manifest["parts"])
    if not manifest["rows"] == written == sum(manifest["statuses"].values()):
        raise ValueError(f"{manifest['rows']} rows in, {written} rows out, statuses {manifest['statuses']}")
    return manifest["statuses"]


with DAG(
    "compose_sample",
    description="Support tickets sorted by a small Mixture-of-Experts model",
    schedule=None,
    tags=["moegen"],
    params={
        "input_uri": Param("s3://lake/tickets/", type="string", description="The table to read"),
        "model_uri": Param(
            "/models/tickets", type="string", description="The checkpoint folder, as the engine sees it"
        ),
        "output_uri": Param("s3://lake/answers", type="string", description="Every run writes a folder below this"),
        "sampling": Param({"max_tokens": 32}, type="object", description="The section `sampling` of the job"),
        "engine": Param({}, type="object", description="The section `engine` of the job"),
    },
    render_template_as_native_obj=True,  # sections arrive as mappings
) as dag:
    answer = MoegenBatchOperator(
        task_id="answer",
        input_uri="{{ params.input_uri }}",
        model_id="{{ params.model_uri }}",
        output_uri="{{ params.output_uri }}/{{ run_id }}",
        prompt_column="text",
        sampling_params="{{ params.sampling }}",
        job_params={"prompt": {"chat": True}, "output": {"rows_per_part": 256}, "engine": "{{ params.engine }}"},
        deferrable=True,
        poll_interval=5,
        timeout=4 * 3600,
        retries=3,
        retry_delay=timedelta(seconds=30),
    )
    check_rows(answer.output)

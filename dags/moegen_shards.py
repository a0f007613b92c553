"""Many tables at once: one mapped task per shard, one output folder per shard, then one count over all.

A shard is known by its content (that is what the job's key is made of), not by its place in the list: cleared and run
again with the list in another order, every task finds its finished job and nothing is computed twice.

With several engines, one connection each, the shards are dealt out by name, so that the order of the list does not
matter for that either: each engine runs one shard at a time, and all of them at once.
"""

from __future__ import annotations

import os
from itertools import cycle
from pathlib import Path, PurePosixPath

from airflow.sdk import DAG, Param, task

from moegen_airflow.operator import MoegenBatchOperator

DEMO_DIR = Path(os.environ.get("MOEGEN_DEMO_DIR") or Path(__file__).resolve().parents[1] / "demo")


@task
def shards(params: dict, run_id: str) -> list[dict[str, str]]:
    """Every shard's table, output folder and engine, together: `expand` would make their product."""
    tables = params["input_uris"] or sorted(str(table) for table in DEMO_DIR.glob("tickets*.parquet"))
    names = {PurePosixPath(table).stem: table for table in tables}
    if len(names) < len(tables):
        raise ValueError(f"input_uris: {tables} hold two tables of one name; they would share an output folder")
    output_uri = params["output_uri"] or f"{DEMO_DIR}/run/output/{run_id}"
    engines = dict(zip(sorted(names), cycle(params["engines"]), strict=False))
    return [
        {"input_uri": table, "output_uri": f"{output_uri}/{name}", "moegen_conn_id": engines[name]}
        for name, table in names.items()
    ]


@task
def count_rows(manifests: list[dict]) -> int:
    return sum(manifest["rows"] for manifest in manifests)


with DAG(
    "moegen_shards",
    description="Sharded tables through a Mixture-of-Experts model, one mapped task each",
    schedule=None,
    tags=["moegen"],
    params={
        "input_uris": Param(None, type=["null", "array"], description="The shards; empty: the demo's tables"),
        "engines": Param(
            ["moegen_default"], type="array", minItems=1, description="Connections to the engines, one for each"
        ),
        "model_uri": Param(str(DEMO_DIR / "model"), type="string", description="The checkpoint folder"),
        "output_uri": Param(None, type=["null", "string"], description="Folder of the shards' output folders"),
        "max_tokens": Param(32, type="integer", minimum=1, description="Longest answer, in tokens"),
    },
    render_template_as_native_obj=True,
) as dag:
    answers = MoegenBatchOperator.partial(
        task_id="answer",
        model_id="{{ params.model_uri }}",
        prompt_column="text",
        sampling_params={"max_tokens": "{{ params.max_tokens }}"},
        job_params={"prompt": {"chat": True}},
        deferrable=True,
        poll_interval=2,
        map_index_template="{{ task.input_uri }}",
    ).expand_kwargs(shards())
    count_rows(answers.output)

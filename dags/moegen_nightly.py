"""A table that is answered whenever it has arrived: one Dag announces it, the next one runs, a third checks.

No Dag here has a clock. `moegen_arrival` stands for whatever writes your table and ends with an outlet: its asset event
says which table has come and where the answers belong. `moegen_nightly` runs on that event. The event of its own outlet
starts `moegen_check`, which finds rows, tokens and the manifest's place in it and needs no access to the table itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from airflow.sdk import DAG, Asset, Metadata, Param, task

from moegen_airflow.operator import MoegenBatchOperator

DEMO_DIR = Path(os.environ.get("MOEGEN_DEMO_DIR") or Path(__file__).resolve().parents[1] / "demo")
TICKETS = Asset("moegen_tickets")
ANSWERS = Asset("moegen_answers")
EVENT = "(triggering_asset_events.values() | first | last).extra"

with DAG(
    "moegen_arrival",
    description="Stands for the Dag that writes the table",
    schedule=None,
    tags=["moegen"],
    params={
        "input_uri": Param(str(DEMO_DIR / "tickets.parquet"), type="string", description="The table that has come"),
        "output_uri": Param(None, type=["null", "string"], description="Where its answers belong"),
    },
):

    @task(outlets=[TICKETS])
    def announce(params: dict, run_id: str):
        output_uri = params["output_uri"] or f"{DEMO_DIR}/run/output/{run_id}"
        yield Metadata(TICKETS, extra={"input_uri": params["input_uri"], "output_uri": output_uri})

    announce()

with DAG(
    "moegen_nightly",
    description="Answers every table that has arrived",
    schedule=[TICKETS],
    max_active_runs=1,
    tags=["moegen"],
):
    MoegenBatchOperator(
        task_id="answer",
        input_uri=f"{{{{ {EVENT}.input_uri }}}}",
        output_uri=f"{{{{ {EVENT}.output_uri }}}}",
        model_id=str(DEMO_DIR / "model"),
        prompt_column="text",
        sampling_params={"max_tokens": 32},
        job_params={"prompt": {"chat": True}},
        deferrable=True,
        poll_interval=2,
        retries=3,
        outlets=[ANSWERS],
    )

with DAG("moegen_check", description="Rows in = rows out", schedule=[ANSWERS], tags=["moegen"]):

    @task
    def check(triggering_asset_events) -> dict:
        """Every input row has come out once, with an answer or with a status that says why not."""
        said = triggering_asset_events[ANSWERS][-1].extra
        if said["rows"] != sum(said["statuses"].values()):
            raise ValueError(f"{said['rows']} rows in, statuses {said['statuses']}: see {said['manifest_uri']}")
        return said

    check()

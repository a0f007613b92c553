"""`python run_dags.py FOLDER '[["dag_id", {conf}], …]'`: `dag.test()` for each, in a home of its own.

Runs of one Dag are the same Dag run each time, as when a user clears it: they share the run id.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

DAY = datetime(2026, 1, 1, tzinfo=UTC)


def main(folder: str, runs: str) -> None:
    initdb()
    dags = DagBag(folder).dags
    for dag_id, conf in json.loads(runs):
        run = dags[dag_id].test(logical_date=DAY, run_after=DAY, run_conf=conf)
        if run.state != "success":
            raise SystemExit(f"{dag_id}: {run.state}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Two engines beside one: the example Dag `moegen_shards` on a running Airflow, its shards dealt out by connection.

Every engine is a job service whose runners have one thread. The same shards go through two of them at once, then
through one. What is compared is rows per second between the start of the first job and the end of the last one: the
start of every runner, seconds of Python's imports each, is in it. Random weights, greedy, answers of one length.

    python -m benchmarks.two_engines [--shards 4] [--rows 200] [--tokens 100] [--rounds 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.airflow.stage import Stage, build_stage
from tests.airflow.standalone import Standalone
from tests.provider.real_service import RealService

ENGINES = ("engine_0", "engine_1")


def turn(airflow: Standalone, stage: Stage, services: list[RealService], name: str, arguments: Any) -> dict[str, Any]:
    """One run of the Dag over all shards, on as many engines as there are services."""
    shards = [stage.table(f"{name}_{number}", arguments.rows) for number in range(arguments.shards)]
    conf = {
        "input_uris": shards,
        "output_uri": f"{stage.folder}/out/{name}",
        "model_uri": f"{stage.folder}/model",
        "engines": list(ENGINES[: len(services)]),
        "max_tokens": arguments.tokens,
    }
    run_id = airflow.run("moegen_shards", **conf)
    mine = [job for service in services for job in service.jobs() if job["output_uri"].startswith(conf["output_uri"])]
    rows = airflow.xcom("moegen_shards", run_id, "count_rows")
    assert rows == arguments.shards * arguments.rows == sum(job["manifest"]["rows"] for job in mine)
    seconds = max(job["ended_at"] for job in mine) - min(job["started_at"] for job in mine)
    tokens = sum(job["manifest"]["completion_tokens"] for job in mine)
    return {
        "engines": len(services),
        "seconds": round(seconds, 2),
        "rows_per_s": rows / seconds,
        "generated_tokens_per_s": tokens / seconds,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All turns, and the ratio of their medians."""
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        stage = build_stage(folder)
        services = [stack.enter_context(RealService(folder / name)) for name in ENGINES]
        environment = {
            f"AIRFLOW_CONN_{name.upper()}": it.connection_uri for name, it in zip(ENGINES, services, strict=True)
        }
        airflow = stack.enter_context(Standalone(folder / "home", stage.dags, **environment))
        turns = [
            turn(airflow, stage, services[:engines], f"round_{number}_{engines}", arguments)
            for number in range(arguments.rounds)
            for engines in (2, 1)
        ]
    medians = {
        engines: statistics.median(turn["rows_per_s"] for turn in turns if turn["engines"] == engines)
        for engines in (1, 2)
    }
    return {
        "cores": os.cpu_count(),
        "shards": arguments.shards,
        "rows_per_shard": arguments.rows,
        "tokens_per_row": arguments.tokens,
        "turns": turns,
        "rows_per_s": {"one engine": medians[1], "two engines": medians[2]},
        "two_over_one": medians[2] / medians[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = json.dumps(measure(arguments), indent=2) + "\n"
    print(figures, end="")
    if arguments.out:
        arguments.out.write_text(figures)


if __name__ == "__main__":
    main()

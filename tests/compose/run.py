"""The compose installation from nothing to nothing: up, the sample Dag, its output, a killed engine, down.

`python tests/compose/run.py [--keep]` needs Docker with Compose and the standard library; it uses a project name of its
own and free ports. Exit code 0: all of it worked. With --keep the containers and volumes stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "moegen-test"
DAG = "compose_sample"
ROWS = 2_212  # of the demo's table
QUICK = {"sampling": {"max_tokens": 32}}
# Long answers, few rows at a time: parts are committed one after the other, and something can happen in between.
LONG = {
    "sampling": {"max_tokens": 32, "ignore_eos": True},
    "engine": {"plan": {"kv_pages": 512, "page_tokens": 16}},
}
Mapping = dict[str, Any]


class Failed(Exception):
    """What did not happen, and what was seen instead."""


def say(text: str) -> None:
    """One line, with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.0f} s  {text}", flush=True)


STARTED = time.monotonic()


class Compose:
    """`docker compose` for the project; every call has a limit."""

    def __init__(self) -> None:
        self.environment = os.environ | {"AIRFLOW_PORT": "0", "S3_PORT": "0"}  # 0: any free port

    def __call__(self, *words: str, limit_s: float = 120, check: bool = True) -> str:
        command = ["docker", "compose", "-p", PROJECT, *words]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, timeout=limit_s, text=True, capture_output=True, check=False
        )
        if check and done.returncode:
            raise Failed(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout

    def run(self, service: str, *words: str, limit_s: float = 120) -> str:
        """A command in a running service."""
        return self("exec", "-T", service, *words, limit_s=limit_s)


class Airflow:
    """Airflow's REST API, as its administrator."""

    def __init__(self, compose: Compose) -> None:
        self.url = "http://" + compose("port", "airflow", "8080").strip()
        passwords = json.loads(compose.run("airflow", "cat", "/opt/airflow/state/passwords.json"))
        self.token = ""
        login = {"username": "admin", "password": passwords["admin"]}
        self.token = self.ask("POST", "/auth/token", login)["access_token"]

    def ask(self, method: str, path: str, body: Mapping | None = None) -> Mapping:
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, json.dumps(body).encode() if body else None, 30) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise Failed(f"{method} {path}: HTTP {error.code}: {error.read()[:500]!r}") from error

    def trigger(self, run_id: str, conf: Mapping) -> None:
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf}
        self.ask("POST", f"/api/v2/dags/{DAG}/dagRuns", body)

    def ended(self, run_id: str) -> str | None:
        state = self.ask("GET", f"/api/v2/dags/{DAG}/dagRuns/{run_id}")["state"]
        return state if state in ("success", "failed") else None


class Engine:
    """The job service, asked from inside its container, where its token is."""

    _ASK = (
        "import json, pathlib, urllib.request as r; token = pathlib.Path('/secrets/moegen_token').read_text();"
        "q = r.Request('http://127.0.0.1:8765/v1/jobs', headers={'Authorization': 'Bearer ' + token});"
        "print(r.urlopen(q, timeout=20).read().decode())"
    )

    def __init__(self, compose: Compose) -> None:
        self.compose = compose

    def job(self, output: str) -> Mapping | None:
        """The one job that writes there; None before there is one."""
        jobs = json.loads(self.compose.run("engine", "python", "-c", self._ASK))["jobs"]
        found = [job for job in jobs if job["output_uri"] == output]
        expect(len(found) <= 1, f"one job for {output}", [job["key"] for job in found])
        return found[0] if found else None

    def inspect(self, output: str) -> Mapping:
        return dict(json.loads(self.compose.run("engine", "moegen", "inspect", output, "--json", "--rows", "2")))


def expect(ok: bool, what: str, seen: object) -> None:
    """Raises `Failed` unless `ok`."""
    if not ok:
        raise Failed(f"expected {what}; saw {seen}")


def wait(look: Callable[[], Any], what: str, limit_s: float) -> Any:
    """The first true answer."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if answer := look():
            return answer
        time.sleep(2)
    raise Failed(f"{what}: not within {limit_s:.0f} s")


def check_output(engine: Engine, output: str) -> Mapping:
    """Complete, every row once; the manifest."""
    found = engine.inspect(output)
    manifest = found["manifest"]
    expect(found["success"] and manifest["rows"] == ROWS, f"_SUCCESS and {ROWS} rows in {output}", found)
    expect(sum(manifest["statuses"].values()) == ROWS, "statuses that sum to the rows", manifest["statuses"])
    expect(found["totals"]["rows"] == ROWS, "as many rows in the parts", found["totals"])
    return dict(manifest)


def sample_dag(airflow: Airflow, engine: Engine, mark: str) -> None:
    """The Dag from trigger to readable output."""
    run_id = f"quick-{mark}"
    airflow.trigger(run_id, QUICK)
    state = wait(lambda: airflow.ended(run_id), "the sample Dag ends", 900)
    expect(state == "success", "the sample Dag to succeed", state)
    manifest = check_output(engine, f"s3://lake/answers/{run_id}")
    expect(manifest["statuses"].get("ok", 0) > 0.95 * ROWS, "answers to nearly all tickets", manifest["statuses"])
    say(f"sample Dag succeeded: {manifest['statuses']}, {manifest['rows_per_s']:.1f} rows/s")


def killed_engine(compose: Compose, airflow: Airflow, engine: Engine, mark: str) -> None:
    """SIGKILL for the engine once parts are committed, up again: the same job goes on and the Dag succeeds."""
    run_id = f"killed-{mark}"
    output = f"s3://lake/answers/{run_id}"
    airflow.trigger(run_id, LONG)

    def committed() -> int:
        progress = (engine.job(output) or {}).get("progress") or {}
        return int(progress.get("rows_committed", 0))

    before = wait(committed, "the first part is committed", 900)
    expect(before < ROWS, "an unfinished job", before)
    compose("kill", "engine")
    say(f"engine killed with {before} of {ROWS} rows committed")
    compose("up", "--no-build", "--wait", "engine", limit_s=300)
    say("engine is healthy again")
    state = wait(lambda: airflow.ended(run_id), "the Dag run with the killed engine ends", 1800)
    expect(state == "success", "the Dag to succeed although the engine was killed", state)
    job = engine.job(output)
    expect(job is not None and job["state"] == "succeeded", "one job that succeeded", job)
    expect(job is not None and job["attempts"] == 2, "two runners of one job", job)
    manifest = check_output(engine, output)
    expect(manifest["resumed_rows"] >= before, f"at least {before} rows kept", manifest["resumed_rows"])
    say(f"Dag succeeded, one job, {manifest['resumed_rows']} rows were not computed again")


def main() -> int:
    """Exit code 0 when all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes as they are")
    options = parser.parse_args()
    compose, mark = Compose(), uuid.uuid4().hex[:8]
    try:
        compose("build", limit_s=3600)
        say("images are built")
        compose("up", "--wait", "--no-build", limit_s=900)
        say("all services are healthy")
        airflow, engine = Airflow(compose), Engine(compose)
        wait(lambda: known(airflow), "the sample Dag is loaded", 180)
        sample_dag(airflow, engine, mark)
        killed_engine(compose, airflow, engine, mark)
        return 0
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"failed: {error}", file=sys.stderr)
        print(compose("ps", "--all", check=False), compose("logs", "--tail", "40", check=False), file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            compose("down", "--volumes", "--timeout", "50", limit_s=300, check=False)
            say("down")


def known(airflow: Airflow) -> bool:
    """Whether the dag-processor has read the Dag."""
    try:
        return bool(airflow.ask("GET", f"/api/v2/dags/{DAG}"))
    except Failed:
        return False


if __name__ == "__main__":
    sys.exit(main())

"""The demo, end to end: engine service, Airflow Dag, answers beside labels. `make demo` installs and then calls it.

Everything it writes lies in a new folder under run/, except Airflow's home, which is kept so that the next run starts
sooner. Exit code 0 means: the Dag run succeeded, every ticket came out, and the accuracy reached `LEAST_ACCURACY`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

DEMO = Path(__file__).resolve().parent
DAGS = DEMO.parent / "dags"
DAG_ID = "moegen_table"
RUNS = DEMO / "run"
AIRFLOW_HOME = RUNS / f"airflow-{version('apache-airflow')}"
TABLE = DEMO / "tickets.parquet"
LEAST_ACCURACY = 0.97
START_S, AIRFLOW_S = 60, 480  # how long to wait for the service, and for Airflow


class DemoError(Exception):
    """What went wrong, and in which file to look."""


@dataclass(frozen=True)
class Place:
    """Where one run of the demo leaves what; `root` is a new folder for every run."""

    root: Path

    @classmethod
    def new(cls) -> Place:
        """Make the folder."""
        root = RUNS / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        root.mkdir(parents=True)
        return cls(root)

    @property
    def output(self) -> Path:
        """The answers and the manifest."""
        return self.root / "output"

    def log(self, name: str) -> Path:
        """What the process `name` printed."""
        return self.root / f"{name}.log"


def say(topic: str, text: str) -> None:
    """One line of progress."""
    print(f"{topic:<9} {text}", flush=True)


def command(name: str) -> str:
    """The console script `name` of the Python that runs this."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise DemoError(f"{path} does not exist; run `make install` first, or start the demo with .venv/bin/python")
    return str(path)


@contextmanager
def child(arguments: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own group, its output appended to `log`; the group is ended with the block."""
    with log.open("ab") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def service(place: Place) -> Iterator[str]:
    """`moegen serve` until the block ends; its URL once it answers."""
    port, log = free_port(), place.log("service")
    url = f"http://127.0.0.1:{port}"
    arguments = [command("moegen"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with child([*arguments, "--state-dir", str(place.root / "service")], log, inherited_env()) as process:
        _wait_healthy(url, process, log)
        yield url


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the service ended with exit code {process.returncode}; see {log}")
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise DemoError(f"the service did not answer at {url}/health within {START_S} s; see {log}")


def inherited_env() -> dict[str, str]:
    """This process's environment without settings for another Airflow or service, and with no proxy for loopback."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "MOEGEN"))}
    return kept | {"NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))}


def airflow_env(place: Place, url: str) -> dict[str, str]:
    """The environment for `airflow`: its own home with sqlite, this repository's Dags, the service's connection."""
    own = {
        "AIRFLOW_HOME": str(AIRFLOW_HOME),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MOEGEN_DEFAULT": url.replace("http://", "moegen://"),
        "MOEGEN_DEMO_DIR": str(DEMO),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return inherited_env() | own


def airflow(arguments: Sequence[str], place: Place, env: dict[str, str], each_second: Any = lambda: None) -> None:
    """An `airflow` command; its output goes to the log.

    Raises:
        DemoError: it failed, or took more than `AIRFLOW_S`.
    """
    log, deadline = place.log("airflow"), time.monotonic() + AIRFLOW_S
    with child([command("airflow"), *arguments], log, env) as process:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise DemoError(f"airflow {arguments[0]} {arguments[1]} took more than {AIRFLOW_S} s; see {log}")
            time.sleep(1)
            each_second()
    if process.returncode:
        raise DemoError(f"airflow {arguments[0]} {arguments[1]} ended with exit code {process.returncode}; see {log}")


def run_dag(url: str, place: Place) -> None:
    """Run the Dag in Airflow with the demo's table as input, saying how far the job is.

    Raises:
        DemoError: the Dag run did not succeed.
    """
    env = airflow_env(place, url)
    prepare_airflow(place, env)
    say("dag", f"{DAG_ID} starts")
    conf = json.dumps({"input_uri": str(TABLE), "output_uri": str(place.output)})
    date = datetime.now(UTC)
    arguments = ["dags", "test", DAG_ID, date.isoformat(), "--conf", conf]
    airflow(arguments, place, env, each_second=ProgressLine(url).update)
    state = run_state(date, env)
    if state != "success":
        raise DemoError(f"the Dag run's state is {state!r}, not 'success'; see {place.log('airflow')}")
    say("dag", f"{DAG_ID} ended: {state}")


def prepare_airflow(place: Place, env: dict[str, str]) -> None:
    """Make Airflow's database, unless an earlier run did."""
    done = AIRFLOW_HOME / "migrated"
    if not done.exists():
        say("airflow", f"makes its database in {shown(AIRFLOW_HOME)}")
        AIRFLOW_HOME.mkdir(exist_ok=True)
        airflow(["db", "migrate"], place, env)
        done.touch()


def run_state(date: datetime, env: dict[str, str]) -> str:
    """The state of the Dag run with this logical date, from Airflow's database."""
    arguments = [command("airflow"), "dags", "list-runs", DAG_ID, "--output", "json"]
    listed = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=AIRFLOW_S, check=False)
    for line in listed.stdout.splitlines():
        if line.startswith("[{"):  # log lines may come before
            dates = {datetime.fromisoformat(run["logical_date"]): run["state"] for run in json.loads(line)}
            return dates.get(date, "unknown")
    raise DemoError(f"airflow dags list-runs gave no runs: {listed.stdout[-300:]} {listed.stderr[-300:]}")


class ProgressLine:
    """Says what the service is doing whenever that has changed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._said = ""

    def update(self) -> None:
        """Ask the service, and print a line if there is news."""
        try:
            jobs = httpx.get(f"{self._url}/v1/jobs", timeout=2, trust_env=False).json()["jobs"]
        except httpx.TransportError:
            return  # a busy moment; the Dag itself says so when the service is gone
        line = self._text(jobs[-1]) if jobs else ""
        if line and line != self._said:
            say("job", line)
        self._said = line

    @staticmethod
    def _text(job: dict[str, Any]) -> str:
        if job["error"]:
            return f"{job['state']}: {job['error']}"
        if not (progress := job["progress"]):
            return job["state"]
        rows = f"{progress['rows_done']:,}/{progress['rows_total']:,} rows, {progress['rows_per_s']:.0f} rows/s"
        return f"{job['state']}, {progress['stage']}: {rows}, {progress['tokens_per_s']:.0f} tokens/s"


def joined(output: Path) -> list[dict[str, Any]]:
    """The labelled table joined with the answers on `ticket_id`; every ticket exactly once.

    Raises:
        DemoError: there is no output, or a ticket has no row in it, or more than one.
    """
    parts = [pq.read_table(part).select(["ticket_id", "output"]) for part in sorted(output.glob("part-*.parquet"))]
    if not parts:
        raise DemoError(f"there are no part-*.parquet files in {output}")
    labels, answers = pq.read_table(TABLE), pa.concat_tables(parts)
    rows = labels.join(answers, "ticket_id", join_type="inner").sort_by("ticket_id")
    if not len(rows) == len(labels) == len(answers):
        raise DemoError(f"{len(labels)} tickets in, {len(answers)} rows out, {len(rows)} of them match; see {output}")
    return rows.to_pylist()


def is_right(row: dict[str, Any]) -> bool:
    """Whether the answer is JSON with exactly the label's queue and priority."""
    try:
        answer = json.loads(row["output"] or "")
    except ValueError:
        return False
    return answer == {"queue": row["label_queue"], "priority": row["label_priority"]}


def accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """The share of right answers."""
    return sum(map(is_right, rows)) / len(rows)


def report(place: Place) -> float:
    """Print some rows, the accuracy and the rates; the accuracy on held-out templates."""
    rows = joined(place.output)
    manifest = json.loads((place.output / "_manifest.json").read_text(encoding="utf-8"))
    for row in [row for row in rows if row["text"] and len(row["text"]) < 100][:6]:
        print(f"\n  {' '.join(row['text'].split())}\n  -> {row['output']}")
    print()
    held_out = [row for row in rows if row["split"] == "held_out"]
    seen = [row for row in rows if row["split"] == "seen"]
    print(f"accuracy {accuracy(seen):.4f} (templates of the training, {len(seen):,} rows)")
    print(f"accuracy {accuracy(held_out):.4f} (held-out templates, {len(held_out):,} rows)")
    print(f"statuses {', '.join(f'{status} {count:,}' for status, count in sorted(manifest['statuses'].items()))}")
    print(f"speed    {manifest['rows_per_s']:.1f} rows/s, {manifest['tokens_per_s']:.1f} generated tokens/s")
    print(f"output   {place.output}")
    return accuracy(held_out)


def shown(path: Path) -> Path:
    """The path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """Exit code 0 when all of it worked, 1 with the reason otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    started = time.monotonic()
    try:
        place = Place.new()
        say("service", f"starting; logs in {shown(place.root)}")
        with service(place) as url:
            say("service", f"answers at {url}")
            run_dag(url, place)
        reached = report(place)
        if reached < LEAST_ACCURACY:
            raise DemoError(f"accuracy {reached:.4f} on held-out templates is under {LEAST_ACCURACY}")
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    print(f"took     {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

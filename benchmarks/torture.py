"""Jobs that are killed, doubled and paused, again and again, and end with the table of an undisturbed run.

    python benchmarks/torture.py --kills 100 [--pairs 50] [--pauses 10] [--poison 1]
    python benchmarks/torture.py --storage s3://bucket/folder ...    # input and output there, credentials as usual

Every runner is a process of its own that runs the shipped command; this process forks it after the imports, which are
most of a small job's start, and ends it with SIGKILL at a random moment of its start or its work. Besides, what a
storage without atomic writes could leave is put into the job's folder: half of a journal file, half of a mark, stray
temporary files; on S3, which writes whole objects, half of a multipart upload too. Then the same command runs again.
The model is a tiny one of random weights, and rows are compared in every column but `attempts`, which says how often a
row was begun.

What a kill costs is given in rows and in seconds. The seconds may exceed the journal's interval by a write and a busy
machine, and on S3 by what is waited there before a request that failed is sent again: see `_SLACK_S`.

Kills come from outside here, so `errors.quarantine_after` is out of reach; `--poison` is the other case: a row with
which the engine really dies.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process must not inherit a pool of threads
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import moegen.cli
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from moegen.storage import describe, join, list_below, list_names, open_fs, open_input, put_replace, read_bytes

from tests.tiny import tiny_checkpoint

_POLL_S = 0.01
_DEADLINE_S = 600.0  # of anything that is waited for
_SLACK_S = {"file": 1.0, "s3": 15.0}  # beyond the journal's interval
_LEASE_S = {"file": 2.0, "s3": 10.0}  # a sign of life must get through
_START_KILLS = 0.15  # the share of kills that come before the first pass
Spec = dict[str, Any]


class Runner:
    """One `moegen run` in a forked process, and what it tells of itself."""

    def __init__(self, folder: Path, spec: Spec, fault: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._status, self.log = folder / f"status-{time.monotonic_ns()}.json", folder / "log.txt"
        job = folder / "job.yaml"
        job.write_text(yaml.safe_dump(spec))
        self.started_s = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(["run", str(job), "--status-file", str(self._status)], fault)
        self.exit_code: int | None = None

    def _run(self, command: list[str], fault: Callable[[], None]) -> None:
        code = 70
        try:
            with self.log.open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            faulthandler.enable(2)  # a crash that nobody planned says where
            moegen.cli._STATUS_EVERY_S = 0.0  # every pass is told, so that it is known what a kill costs
            fault()
            code = moegen.cli.main(command)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def progress(self) -> dict[str, Any]:
        """The last that it told; empty before the first."""
        with suppress(FileNotFoundError):
            return json.loads(self._status.read_bytes())["progress"] or {}
        return {}

    def poll(self) -> int | None:
        """The exit code once it has ended, negative for a signal."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def wait(self) -> int:
        """Until it has ended."""
        until(lambda: self.poll() is not None, f"the end of a runner; its log is {self.log}")
        assert self.exit_code is not None
        return self.exit_code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def until(look: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_DEADLINE_S:.0f} s for {what}")
        time.sleep(_POLL_S)


@dataclass
class Killed:
    """What one kill cost."""

    stage: str
    rows_done: int
    moments: list[tuple[float, int]]  # time, rows done: as told
    at_s: float
    redone: int = 0
    seconds_redone: float = 0.0

    def resumed_at(self, rows_found: int) -> None:
        """The next runner found so many rows done."""
        self.redone = max(self.rows_done - rows_found, 0)
        lost = [at for at, rows in self.moments if rows > rows_found]
        self.seconds_redone = self.at_s - min(lost, default=self.at_s)


@dataclass
class Bench:
    """A model, a table, and jobs over them; input and output lie below `storage`."""

    folder: Path
    storage: str
    rows: int
    answer_tokens: int
    journal_s: float
    random: random.Random = field(default_factory=lambda: random.Random(20261122))

    def __post_init__(self) -> None:
        self.model = tiny_checkpoint(self.folder / "model")
        self.table = join(self.storage, "in.jsonl")
        words = [f"word{number}" for number in range(50)]
        prompts = (" ".join(self.random.choices(words, k=self.random.randint(1, 8))) for _ in range(self.rows))
        lines = [json.dumps({"id": row, "prompt": prompt}) + "\n" for row, prompt in enumerate(prompts)]
        put_replace(self.table, "".join(lines).encode())

    @property
    def kind(self) -> str:
        """Of the storage."""
        return "file" if "://" not in self.storage else "s3"

    @property
    def window_s(self) -> float:
        """How much work a kill may cost."""
        return self.journal_s + _SLACK_S[self.kind]

    def output(self, job: str) -> str:
        """Of a job by this name."""
        return join(self.storage, f"{job}/out")

    def spec(self, output: str, *, sampled: bool = False, **sections: Any) -> Spec:
        """Of a job over the table."""
        spec: Spec = {
            "input": {"uri": self.table},
            "prompt": {"column": "prompt"},
            "model": {"uri": str(self.model)},
            "sampling": {"max_tokens": self.answer_tokens, "temperature": 1.0 if sampled else 0.0, "seed": 7},
            "output": {"uri": output, "rows_per_part": 256},
            "engine": {"plan": {"kv_pages": 128, "page_tokens": 16}},  # some dozens of rows at once: a job has a middle
            "checkpoint": {"journal_seconds": self.journal_s, "lease_seconds": _LEASE_S[self.kind]},
            "errors": {"quarantine_after": 1_000_000},
        }
        return {name: {**spec.get(name, {}), **sections.get(name, {})} for name in {*spec, *sections}}


def read(output: str, *, finished: bool = True) -> pa.Table:
    """The table, without what only says how it came about."""
    if finished and "_SUCCESS" not in list_names(output):
        raise AssertionError(f"{output} has no _SUCCESS")
    tables = []
    for uri in parts(output):
        with open_input(uri, "sequential") as file:
            tables.append(pq.read_table(file))
    return pa.concat_tables(tables)


def parts(output: str) -> list[str]:
    return [join(output, name) for name in list_names(output) if name.startswith("part-")]


def answers(output: str) -> pa.Table:
    """The finished table but for the column that says how often a row was begun."""
    return read(output).drop_columns(["attempts"])


def undisturbed(bench: Bench, name: str, **changes: Any) -> tuple[pa.Table, float, float]:
    """Its table, and the seconds before and after it began to run."""
    runner = Runner(bench.folder / name, bench.spec(bench.output(name), **changes))
    until(lambda: runner.poll() is not None or runner.progress.get("stage") == "running", "the first pass")
    began_s = time.monotonic()
    if (code := runner.wait()) != 0:
        raise AssertionError(f"an undisturbed run ended with {code}; see {runner.log}")
    return answers(bench.output(name)), began_s - runner.started_s, time.monotonic() - began_s


# --- kills ----------------------------------------------------------------------------------------------------------


def kill_often(bench: Bench, kills: int, *, sampled: bool) -> dict[str, Any]:
    """Jobs that are killed so many times in all, each until it is finished, beside one that is not."""
    name = "sampled" if sampled else "greedy"
    expected, start_s, run_s = undisturbed(bench, f"{name}-straight", sampled=sampled)
    begun_s, killed, jobs, equal = time.monotonic(), list[Killed](), 0, True
    while len(killed) < kills or jobs == 0:
        job = f"{name}-{jobs}"
        killed += kill_until_done(bench, job, sampled, kills - len(killed), start_s, run_s)
        equal = equal and answers(bench.output(job)).equals(expected)
        jobs += 1
        print(f"{job}: finished after {len(killed)} of {kills} kills", file=sys.stderr, flush=True)
    stages = [kill.stage for kill in killed]
    result = {
        "jobs": jobs,
        "rows": bench.rows,
        "kills": len(killed),
        "kills_by_stage": {stage: stages.count(stage) for stage in dict.fromkeys(stages)},
        "tables_equal": equal,
        "rows_redone": sum(kill.redone for kill in killed),
        "rows_redone_at_most": max((kill.redone for kill in killed), default=0),
        "seconds_redone_at_most": max((kill.seconds_redone for kill in killed), default=0.0),
        "journal_seconds": bench.journal_s,
        "window_seconds": bench.window_s,
        "seconds": time.monotonic() - begun_s,
        "seconds_undisturbed": start_s + run_s,
    }
    result["within_the_window"] = result["seconds_redone_at_most"] <= bench.window_s
    print(f"{name}: {json.dumps(result)}", flush=True)
    return result


def kill_until_done(bench: Bench, job: str, sampled: bool, kills: int, start_s: float, run_s: float) -> list[Killed]:
    killed: list[Killed] = []
    while True:
        runner = Runner(bench.folder / job, bench.spec(bench.output(job), sampled=sampled))
        left = 1 - (killed[-1].rows_done / bench.rows if killed else 0)
        after_s = plan_kill(bench, start_s, run_s * left / max(kills - len(killed), 1))
        found, kill = watch(runner, None if len(killed) == kills else after_s)
        if killed and found is not None:
            killed[-1].resumed_at(found)
        if kill is None:
            if runner.exit_code != 0:
                said = runner.log.read_text()[-4000:]
                raise AssertionError(f"a resumed run ended with {runner.exit_code} after {len(killed)} kills:\n{said}")
            return killed
        if found is None and killed:  # it was killed before it had looked at what was there
            kill.rows_done, kill.moments = killed[-1].rows_done, killed[-1].moments
            kill.at_s = killed[-1].at_s
        killed.append(kill)
        litter(bench, bench.output(job))


def plan_kill(bench: Bench, start_s: float, mean_run_s: float) -> tuple[str, float]:
    """From which stage on, and how long after it has begun."""
    if bench.random.random() < _START_KILLS:
        return "start", bench.random.uniform(0, start_s)
    return "running", bench.random.uniform(0, 2 * max(mean_run_s, 2 * bench.journal_s))


def watch(runner: Runner, after: tuple[str, float] | None) -> tuple[int | None, Killed | None]:
    """Until the runner ends or is killed: how many rows it found done, and the kill."""
    found: int | None = None
    moments: list[tuple[float, int]] = []
    kill_at = runner.started_s + after[1] if after and after[0] == "start" else None
    deadline = time.monotonic() + _DEADLINE_S
    while runner.poll() is None:
        now, progress = time.monotonic(), runner.progress
        if now > deadline:
            raise TimeoutError(f"a runner takes too long; see {runner.log}")
        stage = progress.get("stage", "starting")
        if stage != "starting":
            found = progress["rows_done"] if found is None else found
            moments.append((now, progress["rows_done"]))
            if kill_at is None and after and stage == "running":
                kill_at = now + after[1]
        if kill_at is not None and now >= kill_at:
            runner.kill()
            if runner.wait() == -signal.SIGKILL:
                done = runner.progress.get("rows_done", 0)
                return found, Killed(runner.progress.get("stage", "starting"), done, [*moments, (now, done)], now)
        time.sleep(_POLL_S)
    return (runner.progress["rows_done"] if found is None else found), None


def litter(bench: Bench, output: str) -> None:
    """What a storage without atomic writes could have left of the killed runner's writes."""
    kept = [uri.rpartition("/_batch/")[2] for uri in list_below(join(output, "_batch"))]
    kept = [name for name in kept if not Path(name).name.startswith(".")]
    epochs = [int(Path(name).stem[6:]) for name in kept if "/lease-" in name]
    if not epochs:
        return
    key = kept[0].partition("/")[0]
    for kind in ("journal", "attempts"):
        whole = [name for name in kept if name.startswith(f"{key}/{kind}/")]
        if whole and bench.random.random() < 0.5:
            last = Path(bench.random.choice(whole))
            data = read_bytes(join(output, f"_batch/{last}"))
            half = f"{max(epochs):06d}-{999_000 + bench.random.randrange(1000):06d}{last.suffix}"
            put_replace(join(output, f"_batch/{last.parent}/{half}"), data[: bench.random.randrange(len(data) or 1)])
    put_replace(join(output, f"_batch/{key}/.lease-000001.json.{bench.random.getrandbits(64):x}"), b"{")
    put_replace(join(output, f".part-000000.parquet.{bench.random.getrandbits(64):x}"), b"PAR1")
    if bench.kind == "s3":
        half_an_upload(join(output, "part-000000.parquet"))


def half_an_upload(uri: str) -> None:
    """A multipart upload that nobody completes."""
    fs, path = open_fs(uri)
    bucket, key, _ = fs.split_path(path)
    begun = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"PAR1")


# --- two runners, paused runners, poison ----------------------------------------------------------------------------


def start_in_pairs(bench: Bench, pairs: int) -> dict[str, Any]:
    """Two runners begin one job at the same moment: one runs it, the other says so and leaves."""
    expected, *_ = undisturbed(bench, "pair-straight")
    endings: list[tuple[int, ...]] = []
    equal = said = True
    begun_s = time.monotonic()
    for number in range(pairs):
        output = bench.output(f"pair-{number}")
        runners = [Runner(bench.folder / f"pair-{number}" / which, bench.spec(output)) for which in ("a", "b")]
        endings.append(tuple(sorted(runner.wait() for runner in runners)))
        leavers = [runner for runner in runners if runner.exit_code == 75]
        said = said and all("another runner (process" in runner.log.read_text() for runner in leavers)
        equal = equal and answers(output).equals(expected)
    result = {
        "pairs": pairs,
        "one_ran_and_one_left": endings.count((0, 75)),
        "who_left_said_why": said,
        "tables_equal": equal,
        "seconds": time.monotonic() - begun_s,
    }
    print(f"pairs: {json.dumps(result)}", flush=True)
    return result


def pause(bench: Bench, pauses: int) -> dict[str, Any]:
    """A runner is stopped beyond its lease, another finishes or goes on with its job, and the first continues."""
    expected, _, run_s = undisturbed(bench, "pause-straight")
    endings: list[str] = []
    untouched, equal, begun_s = True, True, time.monotonic()
    for number in itertools.count():
        if len(endings) == pauses:
            break
        folder, output = bench.folder / f"pause-{number}", bench.output(f"pause-{number}")
        spec = bench.spec(output)
        first = Runner(folder / "first", spec)
        until(lambda first=first: first.progress.get("stage") == "running", "the first pass")
        time.sleep(bench.random.uniform(0, run_s / 2))
        first.kill(signal.SIGSTOP)
        if first.poll() is not None or first.progress.get("stage") != "running":
            first.kill(signal.SIGCONT)  # it was done before it could be paused in its work
            first.wait()
            continue
        second = Runner(folder / "second", spec)
        until(
            lambda second=second: second.progress.get("stage") == "running" or second.poll() is not None, "a successor"
        )
        if number % 2:
            second.wait()
        else:
            time.sleep(bench.random.uniform(0, run_s / 2))
        before = {part: describe(part) for part in parts(output)}
        first.kill(signal.SIGCONT)
        told = "took this job over" in first.log.read_text() if first.wait() == 75 else None
        endings.append("noticed" if told else f"exit {first.exit_code}: {first.log.read_text()[-200:]}")
        second.wait()
        untouched = untouched and all(describe(part) == seen for part, seen in before.items())
        equal = equal and second.exit_code == 0 and answers(output).equals(expected)
    result = {
        "pauses": pauses,
        "noticed": endings.count("noticed"),
        "other_endings": [ending for ending in endings if ending != "noticed"],
        "parts_untouched": untouched,
        "tables_equal": equal,
        "seconds": time.monotonic() - begun_s,
    }
    print(f"pauses: {json.dumps(result)}", flush=True)
    return result


def poison(bench: Bench, row: int) -> dict[str, Any]:
    """The engine dies with one row; the same command runs until the job is done."""
    expected, *_ = undisturbed(bench, "poison-straight")
    spec = bench.spec(bench.output("poison"), errors={"quarantine_after": 3})
    endings: list[int] = []
    while 0 not in endings and len(endings) < 9:
        endings.append(Runner(bench.folder / "poison", spec, lambda: die_with(row)).wait())
    found = read(bench.output("poison"), finished=False)
    victim = found.slice(row, 1).to_pylist()[0]
    others = pa.concat_tables([found.slice(0, row), found.slice(row + 1)]).drop_columns(["attempts"])
    result = {
        "endings": endings,
        "status": victim["status"],
        "error": victim["error"] and victim["error"]["code"],
        "attempts": victim["attempts"],
        "others_equal": others.equals(pa.concat_tables([expected.slice(0, row), expected.slice(row + 1)])),
    }
    print(f"poison: {json.dumps(result)}", flush=True)
    return result


def die_with(row: int) -> None:
    """From now on the engine of this process dies in the first pass that holds the row."""
    from moegen.run.engine import Engine
    from moegen.run.masks import Masks
    from moegen.schedule.step import Step

    next_tokens = Engine._next_tokens

    def dying(engine: Engine, step: Step, masks: Masks) -> list[int]:
        if any(chunk.sequence.request.row_index == row for chunk in step.chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        return next_tokens(engine, step, masks)

    Engine._next_tokens = dying  # type: ignore[method-assign]


def scenarios(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    def bench(name: str, rows: int) -> Bench:
        (folder / name).mkdir()
        storage = str(folder / name) if args.storage is None else join(args.storage, name)
        return Bench(folder / name, storage, rows, args.answer_tokens, args.journal_seconds)

    if args.kills:
        both = bench("kills", args.rows)
        for sampled in (False, True):
            share = args.kills // 2 if sampled else args.kills - args.kills // 2
            yield "sampled" if sampled else "greedy", kill_often(both, share, sampled=sampled)
    if args.pairs:
        yield "pairs", start_in_pairs(bench("pairs", args.small_rows), args.pairs)
    if args.pauses:
        yield "pauses", pause(bench("pauses", args.rows), args.pauses)
    if args.poison:
        yield "poison", poison(bench("poison", args.small_rows), args.small_rows // 2)


def held(results: dict[str, dict[str, Any]]) -> bool:
    """Whether everything is as it must be."""
    kills = [results[name] for name in ("greedy", "sampled") if name in results]
    pairs, pauses, poisoned = (results.get(name) for name in ("pairs", "pauses", "poison"))
    return (
        all(one["tables_equal"] and one["within_the_window"] for one in kills)
        and (pairs is None or (pairs["one_ran_and_one_left"] == pairs["pairs"] and pairs["tables_equal"]))
        and (pauses is None or (pauses["noticed"] == pauses["pauses"] and pauses["parts_untouched"]))
        and (pauses is None or pauses["tables_equal"])
        and (poisoned is None or (poisoned["status"] == "quarantined" and poisoned["others_equal"]))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="half of them on a greedy job, half on a sampled one")
    parser.add_argument("--pairs", type=int, default=0, help="two runners at the same moment, so many times")
    parser.add_argument("--pauses", type=int, default=0, help="a runner stopped beyond its lease, so many times")
    parser.add_argument("--poison", type=int, default=0, help="1: a row with which the engine dies")
    parser.add_argument("--storage", metavar="URI", help="where input and output lie; default: a local folder")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--small-rows", type=int, default=60, help="of the jobs of pairs and poison")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--journal-seconds", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "torture.json")
    args = parser.parse_args()

    import moegen.job.worker
    import moegen.run.engine  # noqa: F401, before any fork

    memory = Path("/dev/shm")  # a killed process loses nothing there, and flushing to it takes no time
    with tempfile.TemporaryDirectory(prefix="moegen-torture-", dir=memory if memory.is_dir() else None) as folder:
        results = dict(scenarios(args, Path(folder)))
    results_held = held(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"held": results_held, **results}, indent=2) + "\n")
    print("everything held" if results_held else "NOT everything held")
    return 0 if results_held else 1


if __name__ == "__main__":
    sys.exit(main())

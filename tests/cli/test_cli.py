"""The `moegen` command as a person or a scheduler meets it: exit codes, standard output, signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.test_predict import MACHINE
from tests.tiny import tiny_checkpoint

Job = dict[str, Any]
MOEGEN = (sys.executable, "-m", "moegen")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Path:
    return job_file(tmp_path, model, rows=20)


def job_file(folder: Path, model: Path, rows: int) -> Path:
    table = folder / "in.jsonl"
    table.write_text("\n".join(json.dumps({"prompt": f"SECRET {row}"}) for row in range(rows)))
    spec = {
        "job": {"name": "nightly"},
        "input": {"uri": str(table)},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 4},
        "output": {"uri": str(folder / "out"), "rows_per_part": 8},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def moegen(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*MOEGEN, *map(str, arguments)]
    given = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, env=given)


def test_run_then_run_again_then_inspect(job: Path, tmp_path: Path) -> None:
    status_file = tmp_path / "status.json"
    run = moegen("run", job, "--json", "--status-file", status_file)
    assert run.returncode == 0, run.stderr
    manifest = json.loads(run.stdout)
    assert manifest == json.loads((tmp_path / "out/_manifest.json").read_text())
    assert (manifest["job_name"], manifest["rows"]) == ("nightly", 20)
    stages = [line.partition(":")[0] for line in run.stderr.splitlines() if line.partition(":")[0].isalpha()]
    assert [*dict.fromkeys(stages)] == ["starting", "loading", "running", "finishing"]
    assert "SECRET" not in run.stderr
    status = json.loads(status_file.read_text())
    assert (status["manifest"], status["error"], status["progress"]["stage"]) == (manifest, None, "finishing")

    again = moegen("run", job)
    assert again.returncode == 0
    assert "20 rows (20 were there already)" in again.stdout

    inspection = json.loads(moegen("inspect", tmp_path / "out", "--json", "--rows", 2).stdout)
    assert (inspection["success"], inspection["totals"]["rows"], len(inspection["rows"])) == (True, 20, 2)
    text = moegen("inspect", tmp_path / "out").stdout
    assert re.search(r"out: complete, 20 rows in 3 parts", text)
    assert '"row_index": 0' in text


def test_set_overrides_the_file_and_a_terminal_gets_a_bar(job: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [*MOEGEN, "run", str(job), "--json", "--set=input.limit=3", f"--set=output.uri={tmp_path}/other"]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        shown = read_terminal(ours)
        output, _ = process.communicate(timeout=60)
    os.close(ours)
    assert json.loads(output)["rows"] == 3
    assert (tmp_path / "other/_SUCCESS").exists()
    assert "3/3 rows" in shown
    assert "tokens/s" in shown


def read_terminal(descriptor: int) -> str:
    shown = b""
    with contextlib.suppress(OSError):  # how the end shows, once the other side is closed
        while chunk := os.read(descriptor, 4096):
            shown += chunk
    return shown.decode(errors="replace")


def edited(change: Callable[[Job], object]) -> Callable[[Path], list[str]]:
    def arguments(job: Path) -> list[str]:
        spec = yaml.safe_load(job.read_text())
        change(spec)
        job.write_text(yaml.safe_dump(spec))
        return ["run", str(job)]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (lambda job: [], 64, "COMMAND"),
        (lambda job: ["rum", str(job)], 64, "rum"),
        (lambda job: ["run"], 64, "JOB.yaml"),
        (lambda job: ["run", "nowhere.yaml"], 64, "nowhere.yaml"),
        (lambda job: ["run", str(job), "--set", "sampling.temprature=1"], 64, "did you mean 'temperature'"),
        (lambda job: ["serve", "--token-file", "nowhere"], 64, "--token-file"),
        (lambda job: ["plan"], 64, "--model"),
        (lambda job: ["plan", "--model", "nowhere"], 65, "nowhere"),
        (lambda job: ["inspect", str(job.parent)], 65, "holds no moegen output"),
        (edited(lambda spec: spec["prompt"].update(column="promt")), 64, "did you mean 'prompt'"),
        (edited(lambda spec: spec["input"].update(uri="nowhere.jsonl")), 65, "nowhere.jsonl"),
        (edited(lambda spec: spec["model"].update(uri="nowhere")), 65, "nowhere"),
        (edited(lambda spec: spec["output"].update(uri="/dev/null/out")), 69, "/dev/null/out"),
        (edited(lambda spec: spec["sampling"].update(max_tokens=600)), 2, "20 of 20 rows failed (20 too_long)"),
        (edited(lambda spec: spec.update(errors={"on_row_error": "fail_fast"}, sampling={"max_tokens": 600})), 2,
         "row 0 has the status too_long (too_long)"),
        (edited(lambda spec: spec.update(limits={"deadline": "2026-01-01T00:00:00Z"})), 75, "at limits.deadline"),
    ],
)  # fmt: skip
def test_exit_codes(job: Path, arguments: Callable[[Path], list[str]], code: int, says: str) -> None:
    run = moegen(*arguments(job))
    assert (run.returncode, run.stdout) == (code, ""), run.stderr
    assert "Traceback" not in run.stderr
    message = run.stderr.splitlines()[-1]
    assert message.startswith("moegen: ")
    assert says in message


def test_errors_as_json_and_in_the_status_file(job: Path, tmp_path: Path) -> None:
    status_file = tmp_path / "status.json"
    run = moegen("run", job, "--json", "--set", "prompt.column=promt", "--status-file", status_file)
    error = json.loads(run.stdout)["error"]
    assert (run.returncode, error["exit_code"]) == (64, 64)
    assert json.loads(status_file.read_text())["error"] == error["message"]


def test_what_nobody_foresaw_is_one_line_and_a_trace_only_with_debug(job: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import moegen.table.reader\ndef broken(*a): raise ZeroDivisionError('unforeseen')\n"
        "moegen.table.reader.TableReader.__init__ = broken"
    )
    run = moegen("run", job, PYTHONPATH=str(tmp_path))
    assert run.returncode == 70
    assert "Traceback" not in run.stderr
    assert "moegen: internal error: ZeroDivisionError: unforeseen (--debug shows where)" in run.stderr
    run = moegen("run", job, "--debug", PYTHONPATH=str(tmp_path))
    assert run.returncode == 70
    assert "Traceback" in run.stderr


def slow(job: Path) -> list[str]:
    """So many long answers, few at a time, that the job has a middle."""
    settings = (
        "sampling.max_tokens=24",
        "sampling.ignore_eos=true",
        "engine.plan.kv_pages=12",
        "engine.plan.page_tokens=16",
    )
    return [*MOEGEN, "run", str(job), *(f"--set={setting}" for setting in settings)]


def wait_for_parts(process: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while len(list(output.glob("part-*"))) < count:
        assert process.poll() is None, "the job ended too early for this test"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "eof"])
def test_a_stopped_run_exits_75_and_the_same_command_goes_on(tmp_path: Path, model: Path, how: object) -> None:
    job = job_file(tmp_path, model, rows=120)
    command = slow(job)
    options = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ}
    more = ["--stop-on-stdin-eof"] if how == "eof" else []
    with subprocess.Popen([*command, *more], **options) as process:  # type: ignore[call-overload]
        wait_for_parts(process, tmp_path / "out", 2)
        if how == "eof":
            process.stdin.close()
        else:
            process.send_signal(how)
        assert process.wait(30) == 75
        assert "rows are committed, and the same command goes on" in process.stderr.read()
    committed = len(list((tmp_path / "out").glob("part-*"))) * 8
    if how == signal.SIGTERM:
        run = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
        assert json.loads(run.stdout)["resumed_rows"] == committed


def test_plan(job: Path, model: Path, tmp_path: Path) -> None:
    text = moegen("plan", job, XDG_CACHE_HOME=str(tmp_path))
    assert text.returncode == 0, text.stderr
    assert "2 of 4 experts per token" in text.stdout
    assert "this machine was not measured (run: moegen probe)" in text.stdout
    plan = json.loads(moegen("plan", "--model", model, "--json", "--set", "engine.plan.page_tokens=32").stdout)
    assert (plan["page_tokens"], plan["prediction"]) == (32, None)


def test_models_tries_one_family_and_shows_it() -> None:
    text = moegen("models", "lfm2_moe")
    assert text.returncode == 0, text.stderr
    assert re.match(r"lfm2_moe +staged +a state slot per sequence\n1 run, 0 are refused", text.stdout)
    assert "1 of 1: lfm2_moe staged" in text.stderr
    (verdict,) = json.loads(moegen("models", "inkling_text", "--json").stdout)
    assert (verdict["family"], verdict["way"]) == ("inkling_text", "refused")
    assert "position_bias" in verdict["reason"]
    unknown = moegen("models", "gpt2", "--json")
    assert unknown.returncode == 64
    assert "choose from afmoe, " in json.loads(unknown.stdout)["error"]["message"]


def test_plan_predicts_for_a_machine_that_was_described(job: Path, model: Path, tmp_path: Path) -> None:
    described = tmp_path / "machine.json"
    described.write_text(json.dumps(asdict(MACHINE)))
    text = moegen("plan", job, "--machine", described)
    assert text.returncode == 0, text.stderr
    assert "20: 8 prompt tokens and 4 of answer" in text.stdout  # "SECRET 0" to "SECRET 19": 8.5
    assert re.search(r"speed +[\d,.]+ generated tokens/s", text.stdout)
    given = moegen("plan", "--model", model, "--machine", described, "--json",
                   "--rows", 1000, "--prompt-tokens", "16,80", "--answer-tokens", 32)  # fmt: skip
    prediction = json.loads(given.stdout)["prediction"]
    assert prediction["generated_tokens"] == pytest.approx(32_000, rel=0.01)
    assert prediction["prompt_tokens"] == 48_000
    assert prediction["generated_tokens_per_s"] * prediction["seconds"] == pytest.approx(32_000, rel=0.01)


def test_plan_without_a_table_still_plans(job: Path, tmp_path: Path) -> None:
    described = tmp_path / "machine.json"
    described.write_text(json.dumps(asdict(MACHINE)))
    plan = moegen("plan", job, "--machine", described, "--json", "--set", f"input.uri={tmp_path}/not-yet.parquet")
    assert json.loads(plan.stdout)["prediction"] is None
    assert "lengths not known" in plan.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "5"], "--rows and --prompt-tokens go together"),
        (["--rows", "0", "--prompt-tokens", "5"], "'0' is not a positive whole number"),
        (["--rows", "1,2", "--prompt-tokens", "5"], "'1,2' is more than one number"),
        (["--machine", "nowhere.json"], "'nowhere.json' cannot be read"),
        (["--set", "engine.host_memory=400MiB"], "the smallest budget that would do is"),
    ],
)
def test_plan_refuses(model: Path, arguments: list[str], told: str) -> None:
    run = moegen("plan", "--model", model, *arguments)
    assert run.returncode == 64
    assert told in run.stderr


def test_version() -> None:
    assert re.fullmatch(r"moegen \d+\.\d+\.\d+\n", moegen("--version").stdout)


def test_commands_start_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from moegen.cli import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run([sys.executable, "-c", code, "run", "nowhere.yaml"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (
        64,
        "moegen: nowhere.yaml: cannot be read: No such file or directory; name a YAML or JSON job file\n",
    )

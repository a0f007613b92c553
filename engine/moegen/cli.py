"""The `moegen` command.

Exit codes: 0 complete, 2 too many rows failed, 64 bad specification or argument, 65 input unreadable or changed,
69 storage, 75 interrupted (the same command goes on), 70 internal. Results go to standard output, progress and errors
to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import moegen
from moegen.cores import share_cores
from moegen.errors import InputError, Interrupted, MoegenError, SpecError, StorageError
from moegen.job.progress import Progress
from moegen.job.status import RunnerStatus
from moegen.job.stop import StopRequest
from moegen.spec import JobSpec, set_field
from moegen.units import format_bytes, format_duration

if TYPE_CHECKING:
    from moegen.plan.workload import Workload
    from moegen.table.manifest import Manifest

_STATUS_EVERY_S = 0.5
_LONGEST = 1200  # characters of an error: it may quote a name or a value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    share_cores()
    try:
        args = _parser().parse_args(arguments)
    except SpecError as error:
        print(f"moegen: {error}", file=sys.stderr)
        return error.exit_code
    try:
        return int(args.command(args) or 0)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123, for the interpreter's own flush at exit
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _failed(args, error)


def _failed(args: argparse.Namespace, error: BaseException) -> int:
    code = Interrupted.exit_code if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 70)
    if args.debug and code == MoegenError.exit_code:
        traceback.print_exception(error)
    hint = "" if args.debug or code != MoegenError.exit_code else " (--debug shows where)"
    print(f"moegen: {_one_line(error)}{hint}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": {"exit_code": code, "message": _one_line(error)}}))
    return int(code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    name = "" if isinstance(error, MoegenError) else f"internal error: {type(error).__name__}: "
    line = " ".join(f"{name}{error}".split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


# --- run ------------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> None:
    if args.dry_run:
        _dry_run(args)
        return
    stopping = StopRequest()
    stopping.on_signals()
    if args.stop_on_stdin_eof:
        stopping.on_stdin_eof()
    with _StatusFile(args.status_file) as status:
        manifest = _run_job(args, stopping, status)
        status.succeed(manifest)
    print(json.dumps(manifest.to_mapping()) if args.json else _summary(manifest, args.job))


def _dry_run(args: argparse.Namespace) -> None:
    from moegen.job.dry_run import dry_run

    found = dry_run(JobSpec.read(args.job, args.set))
    print(json.dumps(asdict(found)) if args.json else f"{args.job}: {found.describe()}")


def _run_job(args: argparse.Namespace, stopping: StopRequest, status: _StatusFile) -> Manifest:
    spec = JobSpec.read(args.job, args.set)
    from moegen.display import display
    from moegen.job.device_lock import device_lock
    from moegen.job.worker import run_job

    device: AbstractContextManager[None] | None = None
    if args.device_lock is not None:
        device = device_lock(args.device_lock, stopping)
    with display() as shown:
        return run_job(spec, report=_both(shown.show, status.show), stopping=stopping, device=device)


def _both(*reports: Callable[[Progress], None]) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        for each in reports:
            each(progress)

    return report


class _StatusFile:
    """Keeps `--status-file` up to date; without one it does nothing. An error on the way out is recorded."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._progress: Progress | None = None
        self._written_at = 0.0

    def __enter__(self) -> _StatusFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._write(error=_one_line(error))

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        news = self._progress is None or _milestone(self._progress) != _milestone(progress)
        self._progress = progress
        if news or now - self._written_at >= _STATUS_EVERY_S:
            self._written_at = now
            self._write()

    def succeed(self, manifest: Manifest) -> None:
        self._write(manifest=manifest.to_mapping())

    def _write(self, **ending: Any) -> None:
        if self._path is None:
            return
        known: dict[str, Any] = {}
        if self._progress is not None:
            known = {"progress": self._progress.to_mapping(), "detail": asdict(self._progress.detail)}
        RunnerStatus(**known, **ending).write(self._path)


def _milestone(progress: Progress) -> tuple[str, int]:
    """What must be known of a runner that ends without a word."""
    return progress.stage, progress.rows_saved


def _summary(manifest: Manifest, job: str) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in manifest.statuses.items()) or "none"
    there = manifest.resumed_rows + manifest.journal_rows
    resumed = f" ({there} were there already)" if there else ""
    return (
        f"{job}: {manifest.rows} rows{resumed}: {counts}\n"
        f"{_tokens(manifest)}; "
        f"this run: {format_duration(manifest.seconds)}, {manifest.rows_per_s:.1f} rows/s, "
        f"{manifest.tokens_per_s:.1f} generated tokens/s"
    )


def _tokens(manifest: Manifest) -> str:
    copied = f" ({manifest.dedup_rows} rows have the answer of an earlier row)" if manifest.dedup_rows else ""
    return f"{manifest.prompt_tokens} prompt tokens, {manifest.completion_tokens} generated tokens{copied}"


# --- plan, models, probe, inspect, report ---------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> None:
    from moegen.plan.explain import explain
    from moegen.plan.machine import Machine
    from moegen.plan.outlook import Outlook
    from moegen.shape import ModelShape

    spec = _planned_spec(args)
    shape = ModelShape.read(spec.model.uri).kept(spec.model.weights)
    machine = Machine.detect(spec.engine.device) if args.machine is None else Machine.read(args.machine)
    workload = _workload(args, spec, shape.max_position_embeddings)
    outlook = Outlook.of(shape, machine, spec.engine, spec.model.dtype, workload)
    print(json.dumps(outlook.to_mapping()) if args.json else explain(shape, machine, outlook))


def _workload(args: argparse.Namespace, spec: JobSpec, max_context_tokens: int) -> Workload | None:
    """As the arguments say, else as the job's table is; None where neither says."""
    from moegen.job.lengths import table_workload
    from moegen.job.prepare import Preparer, needed_columns
    from moegen.plan.workload import Workload
    from moegen.table.reader import TableReader
    from moegen.text import Tokenizer

    if args.rows is not None or args.prompt_tokens is not None:
        if args.rows is None or args.prompt_tokens is None:
            raise SpecError("moegen plan: --rows and --prompt-tokens go together; give both, or neither")
        return Workload.of(args.rows, args.prompt_tokens, args.answer_tokens or [spec.sampling.max_tokens])
    if args.job is None:
        return None
    try:
        reader = TableReader(spec.input, needed_columns(spec))
        return table_workload(reader, Preparer(spec, Tokenizer.load(spec.model.uri), max_context_tokens))[0]
    except (InputError, StorageError) as error:
        print(f"moegen: lengths not known, so nothing is predicted: {_one_line(error)}", file=sys.stderr)
        return None


def _counts(text: str) -> list[int]:
    """`64` or `16,80,600`: positive whole numbers."""
    counts = [int(item) if item.strip().isdecimal() else 0 for item in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number, or several with commas between")
    return counts


def _count(text: str) -> int:
    counts = _counts(text)
    if len(counts) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return counts[0]


def _planned_spec(args: argparse.Namespace) -> JobSpec:
    if (args.job is None) == (args.model is None):
        raise SpecError("moegen plan: give a job file or --model URI, one of them")
    if args.job is not None:
        return JobSpec.read(args.job, args.set)
    unused: dict[str, Any] = {"input": {"uri": "-"}, "prompt": {"column": "-"}, "output": {"uri": "none"}}
    mapping = {**unused, "sampling": {"max_tokens": 1}, "model": {"uri": args.model}}
    for override in args.set:
        set_field(mapping, override)
    return JobSpec.from_mapping(mapping)


def _models(args: argparse.Namespace) -> None:
    from moegen.run.families import families, table, verdicts

    found, known = [], 1 if args.family else len(families())
    for verdict in verdicts(args.family):
        found.append(verdict)
        print(f"{len(found)} of {known}: {verdict.family} {verdict.way}", file=sys.stderr, flush=True)
    print(json.dumps([asdict(verdict) for verdict in found]) if args.json else table(found))


def _probe(args: argparse.Namespace) -> None:
    from moegen.run.probe import probe

    if not args.json:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    machine = probe(args.device, args.model)
    machine.save()
    print(json.dumps(asdict(machine), indent=None if args.json else 2))


def _inspect(args: argparse.Namespace) -> None:
    from moegen.table.inspect import Inspection, inspect_output

    found: Inspection = inspect_output(args.uri, args.rows)
    print(json.dumps(asdict(found), default=str) if args.json else _described(found))


def _described(found: Any) -> str:
    state = "complete" if found.success else "not complete (no _SUCCESS)"
    counts = ", ".join(f"{count} {status}" for status, count in found.totals.statuses.items()) or "no rows"
    lines = [f"{found.uri}: {state}, {found.totals.rows} rows in {found.parts} parts: {counts}"]
    if (manifest := found.manifest) is not None:
        size = sum(part.size_bytes for part in manifest.parts)
        lines.append(f"job {manifest.job_key}, fingerprint {manifest.fingerprint[:16]}, {format_bytes(size)}")
        lines.append(_tokens(manifest))
    lines += ["", *(json.dumps(row, ensure_ascii=False, default=str) for row in found.rows)]
    for code, examples in found.errors.items():
        lines += ["", f"{code}:", *(f"  row {row.row_index} ({row.status}): {row.message}" for row in examples)]
    return "\n".join(lines)


def _report(args: argparse.Namespace) -> None:
    from moegen.report.page import report
    from moegen.storage import put_replace

    page = report(args.uri, args.attempt)
    if args.out == "-":
        print(page)
        return
    put_replace(args.out, page.encode())
    print(json.dumps({"report": args.out}) if args.json else args.out)


# --- serve ----------------------------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> None:
    from moegen.job.allowed import AllowedUris
    from moegen.service import ServiceConfig, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    serve(
        ServiceConfig(
            state_dir=args.state_dir.expanduser(),
            host=args.host,
            port=args.port,
            token=_token(args.token_file),
            allowed=AllowedUris(tuple(args.allow_input), tuple(args.allow_output), tuple(args.allow_model)),
        )
    )


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("MOEGEN_TOKEN") or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--token-file: {str(path)!r} cannot be read: {error}") from error
    if not token:
        raise SpecError(f"--token-file: {str(path)!r} is empty; put the token in it")
    return token


# --- arguments ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moegen", description="Tables of prompts through Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"moegen {moegen.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "run a job, or what is left of it")
    run.add_argument("job", metavar="JOB.yaml")
    _add_set(run)
    run.add_argument("--dry-run", action="store_true", help="read and count every row; load no model, write nothing")
    run.add_argument("--status-file", type=Path, metavar="F", help="keep progress, error and manifest in this file")
    run.add_argument("--stop-on-stdin-eof", action="store_true", help="stop in order when standard input ends")
    run.add_argument("--device-lock", type=Path, metavar="F", help="wait for this file's lock before the model loads")

    plan = _command(commands, "plan", _plan, "show memory need, batch sizes and predicted speed; runs nothing")
    plan.add_argument("job", metavar="JOB.yaml", nargs="?")
    plan.add_argument("--model", metavar="URI", help="a checkpoint folder, instead of a job")
    plan.add_argument(
        "--machine", type=Path, metavar="FILE", help="a machine that probe --json described, not this one"
    )
    plan.add_argument("--rows", type=_count, metavar="N", help="predict for so many rows, not for the job's table")
    plan.add_argument("--prompt-tokens", type=_counts, metavar="N,..", help="their prompts' lengths, equally likely")
    plan.add_argument("--answer-tokens", type=_counts, metavar="N,..", help="their answers' (default: max_tokens)")
    _add_set(plan)

    models = _command(commands, "models", _models, "show which model families run, and how, by trying them")
    models.add_argument(
        "family", metavar="FAMILY", nargs="?", help="a model type, as config.json names it; all without"
    )

    probe = _command(commands, "probe", _probe, "measure this machine, for better plans")
    probe.add_argument("--device", default="auto")
    probe.add_argument("--model", metavar="URI", help="measure the disk by this checkpoint's files")

    inspect = _command(commands, "inspect", _inspect, "look into an output folder")
    inspect.add_argument("uri", metavar="OUTPUT_URI")
    inspect.add_argument("--rows", type=int, default=5, metavar="N", help="how many rows to show (default 5)")

    report = _command(commands, "report", _report, "make a page of a job's figures")
    report.add_argument("uri", metavar="OUTPUT_URI")
    report.add_argument(
        "--out", default="report.html", metavar="F", help="file or URI; -: print it (default report.html)"
    )
    report.add_argument("--attempt", type=int, metavar="N", help="draw this attempt, from 1 (default: the last)")

    serve = _command(commands, "serve", _serve, "run the job service (docs/http-api.md)")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8765, help="0: any free port (default 8765)")
    serve.add_argument("--state-dir", type=Path, default=Path("~/.local/state/moegen"), metavar="DIR")
    serve.add_argument("--token-file", type=Path, metavar="F", help="the bearer token; or set MOEGEN_TOKEN")
    for kind in ("input", "output", "model"):
        serve.add_argument(
            f"--allow-{kind}", action="append", default=[], metavar="PREFIX",
            help=f"jobs may name {kind} URIs below this only; repeatable; default: any",
        )  # fmt: skip
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    parser.add_argument("--debug", action="store_true", help="show where an internal error happened")
    parser.set_defaults(command=function)
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one field of the specification; repeatable",
    )

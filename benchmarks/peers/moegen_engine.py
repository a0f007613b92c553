"""moegen, with the plan that it chooses for these rows; says also what it streamed and how its tail went.

The plan goes by the rates that the machine was measured to have, as a job's does: see `probe_machine`. Of `settings`,
`host_memory` is the budget that the plan is chosen for; the others are fields of the plan.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from moegen.cores import share_cores

share_cores()  # as every command does, before torch is imported

from moegen.plan.machine import Machine
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.run.engine import Engine
from moegen.run.stats import PassReport
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import Sampling
from turn import Generate, Outcome, Row, Turn, take

_TAIL = 0.05  # the share of rows that end last


def open_engine(turn: Turn) -> Generate:
    spec = EngineSpec(device="cpu", host_memory=turn.settings.get("host_memory"))
    workload = Workload(len(turn.rows), tuple((len(row.token_ids), row.answer_tokens) for row in turn.rows))
    plan = choose_plan(ModelShape.read(turn.checkpoint), Machine.detect("cpu"), spec, workload=workload)
    own = {name: value for name, value in turn.settings.items() if name != "host_memory"}
    engine = Engine.open(turn.checkpoint, replace(plan, **own), tokenizer=None)
    atexit.register(engine.__exit__)  # its readers end before the interpreter does, which would end them anywhere
    return lambda rows: generate(engine, rows)


def generate(engine: Engine, rows: Sequence[Row]) -> Outcome:
    answers: list[list[int]] = [[] for _ in rows]
    ended, made, started = 0, 0, time.perf_counter()
    progress = [(0.0, 0, 0)]  # after every pass: seconds, tokens generated, rows ended
    passes: list[PassReport] = []
    for event in engine.generate(_requests(rows)):
        if isinstance(event, Finished):
            answers[event.row_index] = list(event.token_ids)
            ended += 1
        elif isinstance(event, PassReport):
            passes.append(event)
            made += event.generated_tokens
            progress.append((time.perf_counter() - started, made, ended))
    return Outcome(answers, figures={**tail(progress, len(rows)), **streaming(passes), "plan": asdict(engine.plan)})


def streaming(passes: Sequence[PassReport]) -> dict[str, float]:
    """What came from disk, and how long arithmetic waited for it."""
    traffics = [report.traffic for report in passes if report.traffic]
    return {
        "disk_bytes": sum(traffic.disk_bytes for traffic in traffics),
        "waited_seconds": sum(traffic.waited_s for traffic in traffics),
    }


def tail(progress: list[tuple[float, int, int]], rows: int) -> dict[str, float]:
    """Generated tokens per second over the middle half of the tokens, and from when 5 % of the rows are left."""
    total = progress[-1][1]
    middle = [point for point in progress if total / 4 <= point[1] <= 3 * total / 4]
    last = progress[sum(point[2] < (1 - _TAIL) * rows for point in progress) - 1 :]  # from the last pass before
    return {
        "passes": len(progress) - 1,
        "steady_tokens_per_s": _rate(middle),
        "tail_rows": rows - last[0][2],
        "tail_tokens": last[-1][1] - last[0][1],
        "tail_tokens_per_s": _rate(last),
    }


def _rate(points: list[tuple[float, int, int]]) -> float | None:
    """Tokens per second between the first and the last point; None where there is nothing between them."""
    seconds = points[-1][0] - points[0][0] if points else 0
    return (points[-1][1] - points[0][1]) / seconds if seconds else None


def _requests(rows: Sequence[Row]) -> list[Request]:
    return [
        Request(i, tuple(row.token_ids), Sampling(max_tokens=row.answer_tokens, ignore_eos=True))
        for i, row in enumerate(rows)
    ]


if __name__ == "__main__":
    take(open_engine)

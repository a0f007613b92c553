"""moegen within a memory budget, with the plan that it chooses for it; says what it streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from moegen.plan.machine import Machine
from moegen.plan.search import choose_plan
from moegen.run.engine import Engine
from moegen.run.stats import PassReport
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import Sampling
from turn import Generate, Outcome, Row, Turn, take


def open_engine(turn: Turn) -> Generate:
    spec = EngineSpec(device="cpu", host_memory=turn.settings["host_memory"])
    plan = choose_plan(ModelShape.read(turn.checkpoint), Machine.detect("cpu"), spec)
    engine = Engine.open(turn.checkpoint, plan, tokenizer=None)
    return lambda rows: generate(engine, rows)


def generate(engine: Engine, rows: Sequence[Row]) -> Outcome:
    requests = [
        Request(i, tuple(row.token_ids), Sampling(max_tokens=row.answer_tokens, ignore_eos=True))
        for i, row in enumerate(rows)
    ]
    answers: list[list[int]] = [[] for _ in rows]
    passes: list[PassReport] = []
    for event in engine.generate(requests):
        if isinstance(event, Finished):
            answers[event.row_index] = list(event.token_ids)
        elif isinstance(event, PassReport):
            passes.append(event)
    figures = {
        "plan": asdict(engine.plan),
        "disk_bytes": sum(report.traffic.disk_bytes for report in passes if report.traffic),
        "waited_seconds": sum(report.traffic.waited_s for report in passes if report.traffic),
        "passes": [{"tokens": report.tokens, "seconds": report.seconds} for report in passes],
    }
    return Outcome(answers, figures=figures)


if __name__ == "__main__":
    take(open_engine, warm_tokens=1)

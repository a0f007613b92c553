"""How fast a job will go: the real scheduler over the job's lengths, each pass priced by the cost model.

A large job is simulated smaller: a fraction of the rows with the same fraction of the pages and of the tokens per pass,
and each pass counted as so much larger; and of many rows only as many as show the beginning, the steady state and the
tail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from moegen.plan.cost import CostModel, Load
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Rates
from moegen.plan.plan import Plan
from moegen.plan.workload import Workload
from moegen.schedule.scheduler import WINDOW_ROWS, Scheduler
from moegen.schedule.sequence import Request
from moegen.schedule.step import Chunk
from moegen.spec import Sampling


@dataclass(frozen=True)
class Fidelity:
    """How much of a job is simulated."""

    sequences: int = 256  # in flight at once; more are simulated as so many
    rows: int = 6  # times the sequences in flight; beyond that the steady state goes on
    steps: int = 200_000  # sequences times passes up to which all rows are


FULL = Fidelity()


@dataclass(frozen=True)
class Prediction:
    """A job's time, and what it goes by."""

    seconds: float
    generated_tokens: int
    prompt_tokens: int
    generated_tokens_per_s: float  # over the whole job
    steady_tokens_per_s: float  # while rows are left to admit
    tail_seconds: float  # from the last admission on
    passes: int
    binding: str  # the term that most time goes by
    seconds_by_term: dict[str, float]  # terms overlap: their sum may be more than `seconds`

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    footprint: Footprint, plan: Plan, rates: Rates, workload: Workload, fidelity: Fidelity = FULL
) -> Prediction:
    """Simulates the job under `plan`. `rates` must be measured."""
    scale = max(min(workload.concurrency(plan), workload.rows) / fidelity.sequences, 1.0)
    rows = max(round(workload.rows / scale), 1)
    shared = plan.prefix_tokens // plan.page_tokens * len(plan.kv_windows)  # one, however many rows are simulated
    small = replace(
        plan,
        kv_pages=max(round((plan.kv_pages - shared) / scale) + shared, plan.ledger().most_pages(workload.longest)),
        pass_tokens=max(round(plan.pass_tokens / scale), 1),
        level_tokens=max(round(plan.level_tokens / scale), 1),
        state_slots=round(plan.state_slots / scale) or min(plan.state_slots, 1),
    )
    most = int(fidelity.rows * max(workload.concurrency(small), 1))
    simulated = min(rows, max(most, int(fidelity.steps / workload.mean_answer)))
    run = simulate(small, replace(workload, rows=simulated), max(round(WINDOW_ROWS / scale), 1))
    time = CostModel(footprint, plan, rates).time(run.load.scaled(scale))
    return _summed(run, time.seconds, time.terms, scale, rows / simulated, workload)


@dataclass(frozen=True)
class Run:
    """What the scheduler made of the rows."""

    load: Load  # of every pass, as simulated
    admitting: int  # passes until the last row had been admitted


def _summed(
    run: Run, seconds: np.ndarray, terms: dict[str, np.ndarray], scale: float, stretch: float, workload: Workload
) -> Prediction:
    """Sums over passes. Rows that were not simulated go at the steady state's rate, the second half of admission."""
    sampled = run.load.sampled * scale
    steady = slice(run.admitting // 2, run.admitting)
    if run.admitting < 2 or not sampled[steady].any():  # nothing is generated while rows enter: the whole job, then
        steady = slice(0, len(seconds))
    rate = float(sampled[steady].sum() / seconds[steady].sum())
    missing = (stretch - 1) * float(sampled.sum())
    total = float(seconds.sum()) + missing / rate
    generated = float(sampled.sum()) + missing
    share = {name: float(term.sum()) + missing / rate * _share(term, seconds, steady) for name, term in terms.items()}
    return Prediction(
        seconds=total,
        generated_tokens=round(generated),
        prompt_tokens=round(workload.mean_prompt * workload.rows),
        generated_tokens_per_s=generated / total,
        steady_tokens_per_s=rate,
        tail_seconds=float(seconds[run.admitting :].sum()),
        passes=round(len(seconds) + missing / max(float(sampled[steady].mean()), 1e-9)),
        binding=max(share, key=lambda name: share[name]),
        seconds_by_term=share,
    )


def _share(term: np.ndarray, seconds: np.ndarray, steady: slice) -> float:
    return float(term[steady].sum() / seconds[steady].sum())


def simulate(plan: Plan, workload: Workload, window: int = WINDOW_ROWS) -> Run:
    """The passes that the scheduler makes of `workload` under `plan`."""
    requests = list(_requests(workload))
    prefix = (0,) * plan.prefix_tokens
    slots = plan.max_sequences
    scheduler = Scheduler(requests, plan.ledger(), plan.pass_tokens, plan.level_tokens, window, prefix, slots)
    passes: list[tuple[float, ...]] = []
    waiting, admitting = workload.rows, 0
    while chunks := scheduler.next_chunks():
        passes.append(_counted(chunks))
        waiting -= len(scheduler.begun)
        scheduler.begun.clear()
        admitting = len(passes) if waiting > 0 else admitting
        for chunk in chunks:
            chunk.sequence.computed += chunk.length
            if chunk.completes:
                chunk.sequence.tokens.append(0)
                if (
                    len(chunk.sequence.tokens) - chunk.sequence.prompt_tokens
                    == chunk.sequence.request.params.max_tokens
                ):
                    scheduler.end(chunk.sequence)
    return Run(Load(*np.array(passes, np.float64).reshape(-1, len(fields(Load))).T), admitting)


def _counted(chunks: list[Chunk]) -> tuple[float, ...]:
    """The fields of `Load`, of one pass."""
    tokens = sampled = decoding = kv = prefills = prefilled = pairs = 0
    for chunk in chunks:
        end = chunk.start + chunk.length
        tokens += chunk.length
        sampled += chunk.completes
        if chunk.length == 1:
            decoding, kv = decoding + 1, kv + end
        else:
            prefills, prefilled = prefills + 1, prefilled + chunk.length
            pairs += (chunk.start + end + 1) * chunk.length // 2
    return tokens, len(chunks), sampled, decoding, kv, prefills, prefilled, pairs, sampled


def _requests(workload: Workload) -> Iterator[Request]:
    """Lengths as they are where every row has its own, else drawn at random, the same ones each time."""
    lengths = workload.lengths
    dice = random.Random(0)
    for row in range(workload.rows):
        prompt, answer = lengths[row] if len(lengths) == workload.rows else dice.choice(lengths)
        yield Request(row, (0,) * prompt, Sampling(max_tokens=answer))

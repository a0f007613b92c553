"""The steady state of a job of endless equal rows, from its first passes on.

A job that begins with empty pages is in its steady state only when the first rows have ended: for 256 new tokens at two
seconds a pass, after nine minutes. Here it begins with as many rows as the pages hold, their ages spread evenly: a row
of age a has a further tokens in its prompt and as many fewer to go. Once these prompts have been computed, every pass
has the mix of ages, contexts and new prompts that the endless job has, and is measured. (Pages have to be what bounds
the rows in flight, as on a machine with little memory: where it is the tokens of a pass, no pass ever has room.)

Passes of few tokens would take too long to compute these prompts. But there all passes have equally many tokens,
prompts or not, and take equally long: `seconds_of_a_full_pass` is measured from the start.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from moegen.plan.workload import Workload
from moegen.run.engine import Engine
from moegen.run.history import Span
from moegen.run.stats import PassReport
from moegen.schedule.sequence import Request
from moegen.spec import Sampling

_FEWEST_PASSES = 8  # to speak of a steady state


@dataclass(frozen=True)
class Steady:
    """What was measured."""

    span: Span  # the passes after the beginning, as one
    sequences: int  # in flight at the beginning
    warm_seconds: float
    warm_passes: int

    @property
    def steady(self) -> bool:
        """Whether there were enough passes to speak of one."""
        return self.span.passes >= _FEWEST_PASSES

    @property
    def tokens_per_s(self) -> float:
        """Generated."""
        return self.span.generated_tokens / self.span.seconds


def run_steady(engine: Engine, prompt: int, answer: int, until: float, most_passes: int = 1 << 30) -> Steady | None:
    """Runs until the clock `time.monotonic` says `until`, or until enough; None when not even the beginning was over.

    Every answer has `answer` tokens, every prompt `prompt`.
    """
    sequences = max(int(Workload.of(1 << 20, (prompt,), (answer,)).concurrency(engine.plan)), 1)
    vocabulary = engine.host.model.config.get_text_config().vocab_size
    requests = _requests(sequences, prompt, answer, vocabulary)
    beginning = sum(len(request.token_ids) for request in _first(sequences, prompt, answer, vocabulary))
    started, prefilled, warm = time.monotonic(), 0, 0
    warm_seconds: float | None = None
    span: Span | None = None
    events = engine.generate(requests, window=sequences)
    for report in events:
        if not isinstance(report, PassReport):
            continue
        if warm_seconds is None:
            prefilled, warm = prefilled + report.prefill_tokens, warm + 1
            # Rows that ended meanwhile have left prompts to catch up with: until passes have room again.
            if prefilled >= beginning and report.tokens < engine.plan.pass_tokens:
                warm_seconds = time.monotonic() - started
        else:
            one = Span.of(report)
            span = one if span is None else span + one
        if time.monotonic() > until or (span is not None and span.passes >= most_passes):
            break
    events.close()
    return None if span is None or warm_seconds is None else Steady(span, sequences, warm_seconds, warm)


def seconds_of_a_full_pass(engine: Engine, prompt: int, answer: int, until: float, most_passes: int) -> float | None:
    """The mean of passes with as many tokens as the plan allows, but for the first; None if there was not one."""
    vocabulary = engine.host.model.config.get_text_config().vocab_size
    rows = (_request(row, prompt, answer, vocabulary) for row in itertools.count())
    taken: list[float] = []
    full = 0
    events = engine.generate(rows, window=1)
    for report in events:
        if isinstance(report, PassReport) and report.tokens == engine.plan.pass_tokens:
            full += 1
            taken += [report.seconds] if full > 1 else []
        if time.monotonic() > until or len(taken) >= most_passes:
            break
    events.close()
    return sum(taken) / len(taken) if taken else None


def _requests(sequences: int, prompt: int, answer: int, vocabulary: int) -> Iterator[Request]:
    yield from _first(sequences, prompt, answer, vocabulary)
    for row in itertools.count(sequences):
        yield _request(row, prompt, answer, vocabulary)


def _first(sequences: int, prompt: int, answer: int, vocabulary: int) -> Iterator[Request]:
    """Ages 0 to `answer` - 1, evenly."""
    for row in range(sequences):
        age = row * answer // sequences
        yield _request(row, prompt + age, answer - age, vocabulary)


def _request(row: int, prompt: int, answer: int, vocabulary: int) -> Request:
    ids = np.random.default_rng(row).integers(1, vocabulary, prompt).tolist()
    return Request(row, tuple(ids), Sampling(max_tokens=answer, ignore_eos=True))

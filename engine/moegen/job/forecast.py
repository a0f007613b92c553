"""What the planner promises for the rows at hand, before their first pass."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from moegen.plan.predict import predict
from moegen.plan.workload import Workload
from moegen.run.figures import Yardstick

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """Generated tokens/s over the rows that are left, if every answer is as long as it may be."""

    tokens_per_s: float
    seconds: float
    bound: str  # the resource that binds
    rows: int
    mean_prompt_tokens: float
    mean_answer_tokens: float


def forecast(yardstick: Yardstick, workload: Workload | None, rows_left: int) -> Forecast | None:
    """For `rows_left` of the workload's rows. None where this machine was not measured, or nothing is known of them."""
    if workload is None or not yardstick.machine.rates.measured:
        return None
    left = replace(workload, rows=rows_left)
    try:
        promised = predict(yardstick.footprint, yardstick.plan, yardstick.machine.rates, left)
    except Exception as error:  # a forecast is not worth a job
        log.warning("no forecast: %s: %s", type(error).__name__, error)
        return None
    return Forecast(
        tokens_per_s=promised.generated_tokens_per_s,
        seconds=promised.seconds,
        bound=promised.binding,
        rows=rows_left,
        mean_prompt_tokens=left.mean_prompt,
        mean_answer_tokens=left.mean_answer,
    )

"""What experts or pages in 8 bits cost, measured: the same prompts through the model as stored and as it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moegen.plan.plan import Plan
from moegen.run.engine import Engine
from moegen.run.forward import forward
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Request
from moegen.spec import Sampling

_POSITIONS = 16  # of each prompt, the last ones
_LOGITS = 1 << 24  # that are kept for comparison


@dataclass(frozen=True)
class WeightCost:
    """Differences of logits, in the model's own units, at the last positions of some prompts."""

    weights: str  # as in the plan
    kv_dtype: str
    prompts: int
    positions: int
    mean_logit_difference: float
    max_logit_difference: float
    max_logit: float  # the largest magnitude, as stored
    same_token: float  # share of positions with the same likeliest token

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def weight_cost(model_uri: str, stored: Plan, kept: Plan, prompts: Sequence[Sequence[int]]) -> WeightCost:
    """Loads the model twice, once under each plan, and runs the prompts' prefill.

    Raises:
        ValueError: no prompts.
        MoegenError: as `Engine.open`.
    """
    if not prompts:
        raise ValueError("nothing to compare: no prompts")
    expected, got = (_last_logits(model_uri, plan, prompts) for plan in (stored, kept))
    difference = (got - expected).abs()
    return WeightCost(
        weights=kept.weights,
        kv_dtype=kept.kv_dtype,
        prompts=len(prompts),
        positions=len(expected),
        mean_logit_difference=float(difference.mean()),
        max_logit_difference=float(difference.max()),
        max_logit=float(expected.abs().max()),
        same_token=float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def _last_logits(model_uri: str, plan: Plan, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[positions, V]` float32, prompt after prompt."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    requests = [Request(row, tuple(tokens), Sampling(max_tokens=1)) for row, tokens in enumerate(prompts)]
    with Engine.open(model_uri, plan, tokenizer=None) as engine:
        scheduler = Scheduler(requests, plan.ledger(), plan.pass_tokens, slots=plan.max_sequences)
        while (step := scheduler.next_step()) is not None:
            places = [
                (chunk.sequence.request.row_index, chunk.start + offset)
                for chunk in step.chunks
                for offset in range(chunk.length)
            ]
            kept = [at for at, (row, position) in enumerate(places) if position >= len(prompts[row]) - _POSITIONS]
            pieces = forward(
                engine.host, engine.pool, step, plan.attention_tokens, states=engine.states,
                logit_tokens=plan.logit_tokens, keep=torch.tensor(kept, dtype=torch.int64),
            )  # fmt: skip
            rows = (row.float().cpu() for piece in pieces for row in piece)
            # No more than `_LOGITS` are kept; every piece is still computed, as its keys and values are needed.
            for at, logits in zip(kept, rows, strict=True):
                if (len(found) + 1) * len(logits) <= _LOGITS:
                    found[places[at]] = logits.clone()
            for chunk in step.chunks:
                chunk.sequence.computed += chunk.length
            for sequence in step.sampled:
                scheduler.end(sequence)
    return torch.stack([found[place] for place in sorted(found)])

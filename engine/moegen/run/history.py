"""The passes of a run in bounded memory: neighbours are merged as they grow many, totals stay exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moegen.run.stats import Ints, PassReport

MAX_SPANS = 2000  # an even number
_RECENT_S = 60.0
_LEAST, _MOST = frozenset({"expert_tokens_min"}), frozenset({"expert_tokens_max"})
_MEANS = frozenset({"running", "expert_tokens_mean"})  # over passes


@dataclass(frozen=True, slots=True)
class Span:
    """One pass, or several that follow each other. What was not measured in all of them is None."""

    passes: int
    tokens: int
    decode_tokens: int
    prefill_tokens: int
    generated_tokens: int
    running: float  # sequences in flight, mean over the passes
    seconds: float
    kv_tokens: int | None  # tokens whose keys and values were read
    attended_pairs: int | None
    attention_s: float | None
    experts_s: float | None  # with the time that they waited for weights
    waited_s: float | None  # the compute stood still for want of weights
    transfer_s: float | None  # transfers were under way, mean over the readers
    disk_bytes: int | None
    link_bytes: int | None
    active_experts: int | None  # experts that met a token, summed over layers and passes
    expert_tokens_mean: float | None  # tokens per expert of a layer in a pass
    expert_tokens_min: int | None
    expert_tokens_max: int | None

    @classmethod
    def of(cls, report: PassReport) -> Span:
        moved = report.traffic
        return cls(
            passes=1,
            tokens=report.tokens,
            decode_tokens=report.decode_tokens,
            prefill_tokens=report.prefill_tokens,
            generated_tokens=report.generated_tokens,
            running=float(report.running),
            seconds=report.seconds,
            kv_tokens=report.kv_tokens,
            attended_pairs=report.attended_pairs,
            attention_s=report.attention_s,
            experts_s=report.experts_s,
            waited_s=moved.waited_s if moved else None,
            transfer_s=moved.busy_s if moved else None,
            disk_bytes=moved.disk_bytes if moved else None,
            link_bytes=moved.link_bytes if moved else None,
            **_expert_load(report.expert_counts),
        )

    def __add__(self, other: Span) -> Span:
        return Span(**{item.name: _merged(item.name, self, other) for item in fields(Span)})


def _expert_load(counts: Mapping[str, Ints] | None) -> dict[str, Any]:
    if not counts:
        names = ("active_experts", "expert_tokens_mean", "expert_tokens_min", "expert_tokens_max")
        return dict.fromkeys(names)
    tokens = np.concatenate(list(counts.values()))
    return {
        "active_experts": int(np.count_nonzero(tokens)),
        "expert_tokens_mean": float(tokens.mean()),
        "expert_tokens_min": int(tokens.min()),
        "expert_tokens_max": int(tokens.max()),
    }


def _merged(name: str, a: Span, b: Span) -> Any:
    mine, other = getattr(a, name), getattr(b, name)
    if mine is None or other is None:
        return None
    if name in _MEANS:
        return (mine * a.passes + other * b.passes) / (a.passes + b.passes)
    if name in _LEAST:
        return min(mine, other)
    return max(mine, other) if name in _MOST else mine + other


class History:
    """What an engine's passes were, in order.

    Attributes:
        total: all passes as one; None before the first.
        expert_counts: layer -> tokens of each of its experts over all passes, `[E]`.
        recent: the passes of the last one to two minutes as one.
    """

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self.total: Span | None = None
        self.recent: Span | None = None
        self.expert_counts: dict[str, Ints] = {}
        self._max_spans = max_spans
        self._stride = 1  # passes in each span but the last
        self._spans: list[Span] = []
        self._minute: Span | None = None  # the one that is being filled, part of `recent`

    @property
    def spans(self) -> tuple[Span, ...]:
        """At most `max_spans`, all of equally many passes but for the last."""
        return tuple(self._spans)

    def add(self, report: PassReport) -> None:
        """One more pass."""
        span = Span.of(report)
        self.total = span if self.total is None else self.total + span
        self._add_recent(span)
        for layer, counts in (report.expert_counts or {}).items():
            self.expert_counts[layer] = self.expert_counts.get(layer, 0) + counts
        if self._spans and self._spans[-1].passes < self._stride:
            self._spans[-1] += span
            return
        if len(self._spans) == self._max_spans:
            self._spans = [a + b for a, b in zip(self._spans[::2], self._spans[1::2], strict=True)]
            self._stride *= 2
        self._spans.append(span)

    def _add_recent(self, span: Span) -> None:
        if self._minute is not None and self._minute.seconds >= _RECENT_S:
            self.recent, self._minute = self._minute, None
        self.recent = span if self.recent is None else self.recent + span
        self._minute = span if self._minute is None else self._minute + span

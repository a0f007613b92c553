"""What a run has measured, and what follows from it: medians, ratios, the fraction of the ceiling."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from ceiling import gemm_peaks, needed_flops
from moegen.plan.machine import Machine
from transformers import Qwen3MoeConfig
from turn import Outcome, Row

_OURS = "moegen"
_EXACT = "moegen, float32 KV"  # what answers are compared with, where it has run


@dataclass
class Results:
    """Every outcome so far, by the way's name, in the order of the turns."""

    model: Qwen3MoeConfig
    rows: list[Row]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)  # why a way has no outcome, or no further one
    gemm_peaks: dict[str, float] = field(default_factory=dict)  # FLOP/s by dtype, the best of all rounds

    def measure_gemm(self) -> None:
        """Measures the machine's GEMM rates now, and keeps the best of each dtype."""
        for dtype, peak in gemm_peaks().items():
            self.gemm_peaks[dtype] = max(peak, self.gemm_peaks.get(dtype, 0))

    @property
    def generated(self) -> int:
        """Tokens that one turn generates."""
        return sum(row.answer_tokens for row in self.rows)

    @property
    def ceiling(self) -> float:
        """Generated tokens per second if all arithmetic ran at the machine's best GEMM rate."""
        return self._ceiling(narrow_end=False)

    @property
    def narrow_ceiling(self) -> float:
        """The same, of the arithmetic that moegen does: see `needed_flops`."""
        return self._ceiling(narrow_end=True)

    def _ceiling(self, *, narrow_end: bool) -> float:
        flops = needed_flops(self.model, self.rows, narrow_end=narrow_end)
        return self.generated * max(self.gemm_peaks.values()) / flops

    def rates(self, name: str) -> list[float]:
        """Generated tokens per second, one for each turn."""
        return [sum(map(len, outcome.answers)) / outcome.seconds for outcome in self.outcomes[name]]

    @property
    def whole(self) -> list[str]:
        """The ways that were given all rows: only they are compared."""
        return [name for name, (first, *_) in self.outcomes.items() if len(first.answers) == len(self.rows)]

    @property
    def medians(self) -> dict[str, float]:
        """Generated tokens per second of each way, the median of its turns."""
        return {name: statistics.median(self.rates(name)) for name in self.outcomes}

    def best(self, engine: str) -> str | None:
        """The engine's fastest way over all rows."""
        ways = [name for name in self.whole if engine_of(name) == engine]
        return max(ways, key=lambda name: self.medians[name], default=None)

    @property
    def ratios(self) -> dict[str, float]:
        """moegen's rate over that of each peer's fastest way."""
        peers = dict.fromkeys(engine_of(name) for name in self.whole if engine_of(name) != _OURS)
        best = {peer: self.medians[self.best(peer)] for peer in peers}
        return {peer: self.medians[_OURS] / rate for peer, rate in best.items() if _OURS in self.outcomes}

    @property
    def reference(self) -> str | None:
        """The way whose answers the others are compared with."""
        return next((name for name in (_EXACT, _OURS) if name in self.outcomes), None)

    def same_tokens(self, name: str) -> dict[str, int]:
        """How far a way's first answers are the reference's: whole rows, and tokens up to the first that differs."""
        pairs = list(zip(self.outcomes[self.reference][0].answers, self.outcomes[name][0].answers, strict=False))
        return {"rows": sum(a == b for a, b in pairs), "tokens": sum(_common(a, b) for a, b in pairs)}

    def as_mapping(self, requirements: Sequence[str]) -> dict[str, Any]:
        """All of it, for JSON; `requirements` are the peers' installed distributions."""
        machine, ours = Machine.detect("cpu"), self.medians.get(_OURS)
        return {
            "machine": {"cpu": machine.device_name, "cores": machine.cores},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peers": list(requirements),
            },
            "rows": len(self.rows),
            "prompt_tokens": sum(len(row.token_ids) for row in self.rows),
            "generated_tokens": self.generated,
            "generated_tokens_per_s": {name: self.rates(name) for name in self.outcomes},
            "medians": self.medians,
            "reference": self.reference,
            "same_tokens_as_reference": {name: self.same_tokens(name) for name in self.outcomes if self.reference},
            "not_run": self.not_run,
            "gemm_peak_flops_per_s": self.gemm_peaks,
            "gemm_ceiling_tokens_per_s": self.ceiling,
            "fraction_of_ceiling": ours and ours / self.ceiling,
            "narrow_gemm_ceiling_tokens_per_s": self.narrow_ceiling,
            "fraction_of_narrow_ceiling": ours and ours / self.narrow_ceiling,
            "best_way": {engine_of(name): self.best(engine_of(name)) for name in self.whole},
            "ratio_to_best_way": self.ratios,
            "moegen_figures": [outcome.figures for outcome in self.outcomes.get(_OURS, [])],
        }

    def print_table(self) -> None:
        """Every way, fastest first, then what follows."""
        print(f"\n{'way':40s} generated tokens/s (median)   turns   rows as of {self.reference}")
        for name, rate in sorted(self.medians.items(), key=lambda item: -item[1]):
            same = (
                f"{self.same_tokens(name)['rows']} of {len(self.outcomes[name][0].answers)}" if self.reference else ""
            )
            print(f"{name:40s} {rate:27.1f} {len(self.outcomes[name]):7d}   {same}")
        for name, reason in self.not_run.items():
            print(f"{name:40s} {'not run':>27s}           {reason}")
        print(f"{'GEMM ceiling':40s} {self.ceiling:27.1f}")
        for peer, ratio in self.ratios.items():
            print(f"moegen / best of {peer} ({self.best(peer)}): {ratio:.2f}")
        if _OURS in self.outcomes:
            ours = self.medians[_OURS]
            print(f"moegen / GEMM ceiling: {ours / self.ceiling:.1%}")
            print(
                f"moegen / GEMM ceiling where the last layer's experts meet sampled tokens only, "
                f"{self.narrow_ceiling:.1f}: {ours / self.narrow_ceiling:.1%}"
            )
            print(f"moegen, the last 5 % of rows beside the steady state: {self.outcomes[_OURS][-1].figures}")


def engine_of(name: str) -> str:
    """The engine of a way's name."""
    return name.split(",")[0]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))

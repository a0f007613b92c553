"""One turn of one engine: what it is given, and what it hands back.

An engine's module opens the checkpoint, generates for some rows and says what it generated; `take` warms it up, times
it and writes the outcome. Standard library only: this file is imported in every peer's own environment.

    PYTHON benchmarks/peers/ENGINE.py TURN.json OUTCOME.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One prompt, and how many tokens must be generated for it."""

    token_ids: list[int]
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.token_ids) + self.answer_tokens


@dataclass(frozen=True)
class Turn:
    """What an engine is asked to do: greedy decoding, exactly `answer_tokens` per row, past any end token."""

    checkpoint: str
    rows: list[Row]
    settings: dict[str, Any]  # the engine's own
    warm_tokens: int = 4  # per row, at most, of the warming up

    @classmethod
    def read(cls, path: Path) -> Turn:
        """From a file that `write` made."""
        data = json.loads(path.read_text())
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    answers: list[list[int]]  # token ids, in the order of the rows
    seconds: float = 0.0  # generation alone, without opening and warming up
    open_seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)  # what only this engine can say

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """From a file that `take` made."""
        return cls(**json.loads(path.read_text()))


Generate = Callable[[Sequence[Row]], Outcome]


def take(open_engine: Callable[[Turn], Generate]) -> None:
    """Opens the engine, warms it up on a few rows cut to the turn's `warm_tokens`, then times it on all rows."""
    turn, started = Turn.read(Path(sys.argv[1])), time.perf_counter()
    generate = open_engine(turn)
    generate([replace(row, answer_tokens=min(row.answer_tokens, turn.warm_tokens)) for row in turn.rows[:4]])
    opened = time.perf_counter()
    outcome = generate(turn.rows)
    outcome = replace(outcome, seconds=time.perf_counter() - opened, open_seconds=opened - started)
    Path(sys.argv[2]).write_text(json.dumps(asdict(outcome)))

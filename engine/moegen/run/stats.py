"""What a pass was: counted where it happened, reported upwards. A figure that was not measured is None."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from moegen.schedule.step import Step

if TYPE_CHECKING:
    from moegen.memory.weight_stream import StreamFigures

Ints = npt.NDArray[np.int64]
Part = Literal["attention", "experts"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the weight stream has moved: running totals as the engine tells them, differences in a `PassReport`."""

    disk_bytes: int = 0  # read from the checkpoint
    link_bytes: int = 0  # copied from the host to the device
    waited_s: float = 0.0  # the compute stood still for want of weights
    busy_s: float = 0.0  # transfers were under way, mean over the readers

    @classmethod
    def of(cls, figures: StreamFigures, readers: int, device: str, kv_bytes: int = 0) -> Traffic:
        """What a stream with so many readers says; what goes to a GPU goes over the link, wherever it came from.

        `kv_bytes` went there beside the weights.
        """
        return cls(
            disk_bytes=figures.disk_bytes,
            link_bytes=0 if device == "cpu" else figures.disk_bytes + figures.host_bytes + kv_bytes,
            waited_s=figures.waited_seconds,
            busy_s=figures.busy_seconds / readers,
        )

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(
            self.disk_bytes - before.disk_bytes,
            self.link_bytes - before.link_bytes,
            self.waited_s - before.waited_s,
            self.busy_s - before.busy_s,
        )


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass of the engine."""

    tokens: int  # all tokens of the pass
    decode_tokens: int  # of sequences that were already answering
    generated_tokens: int  # sampled in it
    running: int  # sequences in flight after it
    seconds: float  # since the pass before ended: drawing its rows and taking its results are part of a pass
    kv_tokens: int | None = None  # tokens whose keys and values were read, each sequence's context once
    attended_pairs: int | None = None  # pairs of a query and a key at or before it
    attention_s: float | None = None
    experts_s: float | None = None  # with the time that they waited for weights
    traffic: Traffic | None = None
    expert_counts: Mapping[str, Ints] | None = field(default=None, repr=False, compare=False)  # layer -> tokens `[E]`

    @property
    def prefill_tokens(self) -> int:
        return self.tokens - self.decode_tokens


class Recorder:
    """Counts what happens inside a pass; one for an engine.

    Args:
        traffic: asked after every pass for the weight stream's totals; an engine in which nothing moves gives
            `Traffic`, one that cannot tell gives None.
        now: a clock in seconds.
    """

    def __init__(
        self, traffic: Callable[[], Traffic] | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._traffic, self._now = traffic, now
        self.begin()

    def begin(self) -> None:
        """The first pass begins now; what was counted before belongs to none."""
        self._started_s = self._now()
        self._moved = self._traffic() if self._traffic else None
        self._forget()

    def count(self, layer: str, counts_E: Sequence[int] | Ints) -> None:
        """Each expert of a layer met so many tokens. `layer` is the module's name in the model."""
        counts = np.array(counts_E, np.int64)
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """The seconds inside are spent on this part. For devices that compute while the host waits, the CPU that is."""
        started = self._now()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + self._now() - started

    def end_pass(self, step: Step, running: int) -> PassReport:
        """What happened since the pass before; `running` sequences are in flight after this one."""
        now = self._now()
        moved = self._traffic() if self._traffic else None
        report = PassReport(
            tokens=step.tokens,
            decode_tokens=step.decode_tokens,
            generated_tokens=len(step.sampled),
            running=running,
            seconds=now - self._started_s,
            kv_tokens=sum(chunk.start + chunk.length for chunk in step.chunks),
            attended_pairs=int(step.positions.sum()) + step.tokens,
            attention_s=self._seconds.get("attention"),
            experts_s=self._seconds.get("experts"),
            traffic=moved - self._moved if moved is not None and self._moved is not None else None,
            expert_counts=self._counts or None,
        )
        self._started_s, self._moved = now, moved
        self._forget()
        return report

    def _forget(self) -> None:
        self._counts: dict[str, Ints] = {}
        self._seconds: dict[Part, float] = {}

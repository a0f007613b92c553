"""Admission: which tokens make the next pass.

Invariants:
- Every running sequence that is decoding is in every pass; prefill fills what is left of `pass_tokens`.
- A sequence is admitted only with pages for all its tokens (in layers with a window: for those of a pass); it grows
  page by page while it decodes, and gives back what is outside a window.
- When no page is free the youngest sequence is preempted: its pages go back, its tokens stay, and it is
  computed again later. Sampling depends on (seed, row, position) alone, so its answer does not change.
- Rows are drawn a window at a time, and those that may answer longest enter first. A window is admitted whole before
  the next is drawn, so that no row waits for ever.
- Once no more rows come, rows enter only as fast as keeps the remaining passes of one size: see `level`.
- The oldest sequence is never preempted for another, and no sequence is admitted that could outgrow the whole
  pool: so the oldest always ends, and admission cannot livelock.
- A running sequence has a state slot, and there are no more running sequences than slots: see `slots`.
- Rows that begin alike share the pages of that beginning: see `prefix`.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator

from moegen.row import RowError, Status
from moegen.schedule.level import Level
from moegen.schedule.pages import PageLedger
from moegen.schedule.prefix import SharedPrefix
from moegen.schedule.sequence import Finished, Request, Sequence
from moegen.schedule.slots import SlotLedger
from moegen.schedule.step import Chunk, Step

WINDOW_ROWS = 1024  # read ahead of admission, to be put in order


class Scheduler:
    """Turns a stream of requests into passes.

    Call `next_step` for a pass, run it, append the sampled tokens to its sequences, `end` those that are done, and
    repeat until it returns None. `refused` collects rows that can never fit, `begun` those that were admitted.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        ledger: PageLedger,
        pass_tokens: int,
        level_tokens: int | None = None,
        window: int = WINDOW_ROWS,
        prefix: tuple[int, ...] = (),
        slots: int | None = None,
    ) -> None:
        """Without `level_tokens`, every pass is as large as it can be. `prefix`: tokens with which most rows begin.

        `slots`: sequences that may run at once; None: as many as a pass has tokens. Where slots keep states there must
        be no `prefix`: a state at its end is not kept.
        """
        self.ledger = ledger
        self.pass_tokens = pass_tokens
        self.running: list[Sequence] = []  # oldest first
        self.refused: list[Finished] = []
        self.begun: list[int] = []
        self._window = window
        self._waiting: deque[Sequence] = deque()  # preempted, or drawn but not yet admitted
        self._requests: Iterator[Request] = iter(requests)
        self._drawn = 0
        self._exhausted = False  # no more rows come
        self._level = Level(pass_tokens, pass_tokens if level_tokens is None else level_tokens)
        self._prefix = SharedPrefix(prefix, ledger)
        self._slots = SlotLedger(pass_tokens if slots is None else min(slots, pass_tokens))
        self._growing = 0  # of those that run, the sequences that may need a page more than they have

    def next_step(self) -> Step | None:
        """The next pass, or None when every request has ended (rows newly refused may remain in `refused`)."""
        chunks = self.next_chunks()
        return Step(chunks, self.ledger.page_tokens) if chunks else None

    def next_chunks(self) -> list[Chunk]:
        """What makes the next pass, decode tokens first."""
        self._grow_running()
        self._growing = sum(map(self._may_grow, self.running))
        if not self._waiting:
            self._draw()
        self._level.begin_pass([*self.running, *self._waiting], more=not self._exhausted)
        chunks: list[Chunk] = []
        taken = 0
        prefilling: list[Sequence] = []
        for sequence in self.running:
            pending = sequence.pending
            if pending > 1:
                prefilling.append(sequence)
            elif pending:
                taken += self._take(sequence, 1, chunks)
        for sequence in prefilling:
            if length := min(sequence.pending, self._level.room(sequence, taken)):
                taken += self._take(sequence, length, chunks)
        while (admitted := self._admit(taken)) is not None:
            taken += self._take(admitted, min(admitted.pending, self._level.room(admitted, taken)), chunks)
        if not chunks:
            self._prefix.drop()
        return chunks

    def _take(self, sequence: Sequence, length: int, chunks: list[Chunk]) -> int:
        chunks.append(Chunk(sequence, sequence.computed, length))
        self._prefix.add(chunks[-1])
        return length

    def end(self, sequence: Sequence) -> None:
        """The sequence is done: its pages are free at once."""
        self._leave(sequence)

    def _grow_running(self) -> None:
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if self.ledger.gives_back and not sequence.goes_back:
                self.ledger.trim(sequence.pages, sequence.computed, sequence.shared)
            if self._grow(sequence):
                index += 1
            elif not self._prefix.drop():
                self._preempt(self.running[-1])

    def _grow(self, sequence: Sequence) -> bool:
        return self.ledger.grow(sequence.pages, len(sequence.tokens), sequence.computed, whole=sequence.goes_back)

    def _may_grow(self, sequence: Sequence) -> bool:
        return self.ledger.pages_for(sequence.most_computed) > self.ledger.pages_for(len(sequence.tokens))

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._prefix.leave(sequence)
        self._slots.give_back(sequence.slot)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _admit(self, taken: int) -> Sequence | None:
        """Moves the next sequence from waiting to running if the pass, with `taken` tokens in it, has room for it.

        And if its pages are free, with a page of growth for each that runs and may grow.
        """
        if not self._slots.free or not (self._waiting or self._draw()):
            return None
        sequence = self._waiting[0]
        if not self._level.room(sequence, taken):
            return None
        if not self._prefix.open_to(sequence) or not self._has_pages(sequence):
            return None
        self._prefix.enter(sequence)
        self._grow(sequence)
        self._growing += self._may_grow(sequence)
        self._waiting.popleft()
        sequence.slot = self._slots.take()
        insort(self.running, sequence, key=lambda s: s.order)
        self.begun.append(sequence.request.row_index)
        return sequence

    def _has_pages(self, sequence: Sequence) -> bool:
        missing = self._prefix.missing_pages(sequence) + self._growing * self.ledger.growth
        return self.ledger.free >= missing or (
            not sequence.shared and self._prefix.drop() and self.ledger.free >= missing
        )

    def _draw(self) -> bool:
        """Draws the next window, if there is one; rows that can never fit are refused with a status."""
        drawn: list[Request] = []
        self._exhausted = True
        for request in self._requests:
            tokens = len(request.token_ids) + request.params.max_tokens
            most = self.ledger.whole_tokens if request.continuations else self.ledger.capacity_tokens
            if tokens <= most:
                drawn.append(request)
            else:
                self.refused.append(_never_fits(request, tokens, most))
            if len(drawn) == self._window:
                self._exhausted = False
                break
        for request in sorted(drawn, key=lambda r: -r.params.max_tokens):  # stable: else as they came
            shared = self._prefix.shared_by(request)
            self._waiting.append(Sequence(request, self._drawn, list(request.token_ids), shared=shared))
            self._drawn += 1
        return bool(drawn)


def _never_fits(request: Request, tokens: int, capacity_tokens: int) -> Finished:
    message = (
        f"prompt and max_tokens need {tokens} tokens of KV and the pool holds {capacity_tokens}; "
        "lower max_tokens or give the engine more memory"
    )
    error = RowError("kv_pool_too_small", message, "admit", retryable=True)
    return Finished(request.row_index, Status.TOO_LONG, len(request.token_ids), error=error, sample=request.sample)

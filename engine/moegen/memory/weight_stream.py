"""Pieces of weights on their way to the device, ahead of the one in use.

`with stream.take(piece) as group` lends a piece from its home: a resident one as it is, any other in a slot of a small
ring. The pieces that passes need are announced in order, and `depth` of them are read ahead by reader threads; depth 0
reads a piece when it is taken, in the thread that takes it.

Where a pass is so small that some experts meet no token, those that met many of late are read first: what the router
then does not ask for and has not been begun is left out.

The invariant that makes any order of takes correct: the slots belong to the piece in use and to those announced after
it, cyclically. Taking a piece moves this window to it. What falls out of the window is read no further, and keeps its
slot only until another piece needs it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from moegen.memory.direct_read import DirectFiles
from moegen.memory.stored_experts import ExpertSource
from moegen.memory.weight_home import Piece, WeightHomes
from moegen.memory.weight_slot import Fill, HostCopy, Slot, SlotReader, Work
from moegen.ops.expert_weights import Counts, ExpertGroup
from moegen.ops.threads import use_threads

Floats = npt.NDArray[np.float64]
_REMEMBERED = 0.5  # of what experts met, from one pass to the next


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """What a stream has done since it was opened."""

    disk_bytes: int = 0  # read from the checkpoint
    host_bytes: int = 0  # copied from the host's slab
    waited_seconds: float = 0.0  # the thread that takes, for pieces that were not there yet
    busy_seconds: float = 0.0  # of all readers together


class WeightStream:
    """Lends pieces from their homes, to one thread. Use as a context manager: its threads end with it."""

    def __init__(self, homes: WeightHomes, files: DirectFiles, *, slots: int, depth: int, readers: int = 2) -> None:
        """Makes the slots, announces all that does not stay on the device, and begins to read ahead.

        Args:
            homes: where each piece lives.
            files: open as long as the stream.
            slots: pieces that have room on the device; more than `depth`.
            depth: pieces read ahead of the one in use.
            readers: threads that read, if `depth` is not 0.
        """
        if homes.streamed and slots <= depth:
            raise ValueError(f"{slots} slots cannot hold a piece in use and {depth} ahead of it")
        self._homes, self._depth, self._device = homes, depth, homes.arithmetic.device
        self._works: dict[Piece, tuple[Work, ...]] = {
            **homes.disk, **{piece: tuple(HostCopy.all_of(group)) for piece, group in homes.host.items()}
        }  # fmt: skip
        self._free = _empty_slots(homes, slots)
        self._fills: dict[Piece, Fill] = {}
        self._order: tuple[Piece, ...] = ()
        self._place: dict[Piece, int] = {}
        self._at = -1  # the place in the order of the piece taken last
        self._skipped: frozenset[Piece] = frozenset()
        self._met: dict[str, Floats] = {}  # layer -> tokens per expert, of late
        self._window: tuple[Piece, ...] = ()  # the most urgent first
        self._changed = threading.Condition()
        self._closed = False
        self._figures = StreamFigures()
        largest = max((request.nbytes for requests in homes.disk.values() for request in requests), default=0)
        hands = min(max(readers, 1) if depth else 1, len(self._works))
        self._readers = [SlotReader(files, largest, self._device) for _ in range(hands)]
        self._threads = [
            threading.Thread(target=self._read_ahead, args=(reader,), name=f"moegen-reader-{number}", daemon=True)
            for number, reader in enumerate(self._readers if depth else ())
        ]
        self.announce(homes.streamed)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; each ends the read that it is in. Nothing can be taken any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for reader in self._readers:
            reader.close()

    @property
    def figures(self) -> StreamFigures:
        with self._changed:
            return self._figures

    @property
    def slot_bytes(self) -> int:
        """Memory of all slots."""
        held = [fill.slot for fill in self._fills.values()]
        return sum(slot.nbytes for slot in [*held, *(slot for slots in self._free.values() for slot in slots)])

    def announce(self, pieces: Iterable[Piece]) -> None:
        """From now on pieces are taken in this order, again and again, until another is announced.

        An order only says what to read ahead: any piece can be taken at any time.
        """
        with self._changed:
            self._order = tuple(dict.fromkeys(piece for piece in pieces if piece in self._works))
            self._place = {piece: place for place, piece in enumerate(self._order)}
            self._at, self._skipped = -1, frozenset()
            self._move_window(())

    def skip(self, pieces: Iterable[Piece]) -> None:
        """These announced pieces will not be taken before the next `skip`: they are not read ahead."""
        with self._changed:
            self._skipped = frozenset(pieces)

    def moves(self, pieces: Iterable[Piece]) -> bool:
        """Whether any of them has to come."""
        return not self._works.keys().isdisjoint(pieces)

    def note(self, layer: str, counts_E: Counts) -> None:
        """In a pass, each expert of a layer met so many tokens."""
        with self._changed:
            self._met[layer] = np.array(counts_E, np.float64) + _REMEMBERED * self._met.get(layer, 0.0)

    @contextmanager
    def take(self, piece: Piece, used: Collection[int] | None = None) -> Iterator[ExpertGroup]:
        """Lends the weights of a piece.

        Args:
            piece: one of the homes' pieces.
            used: the experts (numbers in the layer) that will be multiplied, None for all: others may be left out.

        Raises:
            StorageError: the piece could not be read; another take tries again.
        """
        resident = self._homes.device.get(piece)
        if resident is not None:
            yield resident
            return
        fill = self._arrived(piece, used)
        try:
            yield fill.slot.group(piece)
        finally:
            self._release(fill)

    def _arrived(self, piece: Piece, used: Collection[int] | None) -> Fill:
        started = time.perf_counter()
        with self._changed:
            fill = self._demand(piece)
            if used is not None:
                fill.leave_out_unused(used)
            if not self._threads:
                self._read_now(fill)
            self._changed.wait_for(lambda: self._closed or fill.settled)
            self._count(waited_seconds=time.perf_counter() - started)
            self._require_open()
            if fill.error is not None:
                self._drop(fill)
                self._window = tuple(other for other in self._window if other != piece)  # only a take tries it again
                raise fill.error
            fill.lent = True
            return fill

    def _demand(self, piece: Piece) -> Fill:
        """Moves the window to the piece; waits for a slot, which a read that was given up may still write to."""
        self._require_open()
        kind = self._kind(piece)
        if not self._free[kind] and all(fill.lent for fill in self._fills.values() if self._kind(fill.piece) == kind):
            raise ValueError("every slot is lent; give one back before taking the next")
        self._at = self._place.get(piece, self._at)
        self._move_window((piece,))
        self._changed.wait_for(lambda: self._closed or piece in self._fills)
        self._require_open()
        return self._fills[piece]

    def _release(self, fill: Fill) -> None:
        with self._changed:
            fill.lent = False
            fill.slot.release(self._device)
            if fill.partial:
                self._drop(fill)
            self._move_window(())

    # The window. All of this runs with `_changed` held.

    def _move_window(self, in_use: tuple[Piece, ...]) -> None:
        """What is in use and what comes after it; as long as nothing is in use, its slot reads ahead as well."""
        ahead = self._depth + 1 - len(in_use) if self._depth else 0
        self._window = tuple(dict.fromkeys((*in_use, *islice(self._upcoming(), ahead))))
        self._begin_fills()

    def _upcoming(self) -> Iterator[Piece]:
        """The announced pieces after the one taken last, once around."""
        for step in range(1, len(self._order) + 1):
            piece = self._order[(self._at + step) % len(self._order)]
            if piece not in self._skipped:
                yield piece

    def _begin_fills(self) -> None:
        for piece in self._window:
            if piece not in self._fills and (slot := self._room(self._kind(piece))) is not None:
                self._fills[piece] = Fill(piece, slot, deque(self._popular_first(piece)))
        self._changed.notify_all()

    def _popular_first(self, piece: Piece) -> Sequence[Work]:
        """A piece's works as they lie on disk, unless lately not all of its experts were used."""
        works, met_E = self._works[piece], self._met.get(piece.layer)
        if met_E is None or (met_E[piece.first : piece.first + piece.experts] >= 1).all():
            return works
        return sorted(works, key=lambda work: -sum(met_E[expert] for expert in work.experts))

    def _room(self, kind: _Kind) -> Slot | None:
        """A free slot, or that of a piece outside the window that nobody uses or reads."""
        for fill in self._fills.values():
            if self._free[kind]:
                break
            outside = fill.piece not in self._window and self._kind(fill.piece) == kind
            if outside and not fill.lent and not fill.running:
                self._drop(fill)
                break
        return self._free[kind].pop() if self._free[kind] else None

    def _drop(self, fill: Fill) -> None:
        del self._fills[fill.piece]
        self._free[self._kind(fill.piece)].append(fill.slot)

    def _kind(self, piece: Piece) -> _Kind:
        return _kind(self._homes.sources[piece.layer])

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the weight stream is closed")

    def _count(self, work: Work | None = None, **seconds: float) -> None:
        own = self._figures
        moved = {"host_bytes" if isinstance(work, HostCopy) else "disk_bytes": work.nbytes} if work else {}
        added = {name: getattr(own, name) + value for name, value in {**moved, **seconds}.items()}
        self._figures = replace(own, **added)

    # Reading. The lock is not held while data moves.

    def _read_ahead(self, reader: SlotReader) -> None:
        use_threads(1)  # a team of its own for every copy would fight the arithmetic for the cores
        with self._changed:
            while not self._closed:
                fill = next((f for piece in self._window if (f := self._fills.get(piece)) and f.works), None)
                if fill is None:
                    self._changed.wait()
                else:
                    self._do_next(fill, reader)

    def _read_now(self, fill: Fill) -> None:
        while fill.works:
            self._do_next(fill, self._readers[0])

    def _do_next(self, fill: Fill, reader: SlotReader) -> None:
        """One work of the fill: gives the lock away while it runs, and takes it again."""
        work = fill.works.popleft()
        fill.running += 1
        started, error = time.perf_counter(), None
        self._changed.release()
        try:
            reader.do(work, fill.slot, fill.piece)
        except BaseException as raised:
            error = raised
        finally:
            self._changed.acquire()
        fill.running -= 1
        self._count(work, busy_seconds=time.perf_counter() - started)
        if error is not None:
            fill.fail(error)
        self._begin_fills()


@dataclass(frozen=True)
class StreamedExperts:
    """A layer whose groups come through a stream (an `ExpertSupply`)."""

    stream: WeightStream
    pieces: tuple[Piece, ...]

    def lend(self, counts_E: Counts) -> Iterator[ExpertGroup]:
        """The groups that have tokens, in expert order; of a group, only the experts that have tokens are read."""
        if not self.stream.moves(self.pieces):
            for piece in self.pieces:
                if any(counts_E[piece.first : piece.first + piece.experts]):
                    with self.stream.take(piece) as group:
                        yield group
            return
        used = {expert for expert, count in enumerate(counts_E) if count}
        own = {piece: used & set(range(piece.first, piece.first + piece.experts)) for piece in self.pieces}
        self.stream.note(self.pieces[0].layer, counts_E)
        self.stream.skip(piece for piece, experts in own.items() if not experts)
        for piece, experts in own.items():
            if experts:
                with self.stream.take(piece, experts if len(experts) < piece.experts else None) as group:
                    yield group


_Kind = tuple[object, ...]  # what makes slots exchangeable


def _kind(source: ExpertSource) -> _Kind:
    return tuple((p.out_features, p.in_features, p.dtype, p.coding) for p in (source.up, source.down))


def _empty_slots(homes: WeightHomes, slots: int) -> dict[_Kind, list[Slot]]:
    """`slots` of each geometry that has to come, with room for its largest piece."""
    largest: dict[_Kind, Piece] = {}
    for piece in homes.streamed:
        kind = _kind(homes.sources[piece.layer])
        largest[kind] = max(largest.get(kind, piece), piece, key=lambda p: p.experts)
    return {
        kind: [Slot(homes.arithmetic.empty_group(homes.sources[piece.layer], 0, piece.experts)) for _ in range(slots)]
        for kind, piece in largest.items()
    }

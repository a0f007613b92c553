"""The weight stream: whatever the order, the depth and the home, what is lent equals the checkpoint."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moegen.errors import StorageError
from moegen.memory import direct_read, read_request
from moegen.memory.checkpoint import Checkpoint
from moegen.memory.direct_read import DirectFiles, ReadBuffer
from moegen.memory.stored_experts import ExpertSource
from moegen.memory.weight_home import Arithmetic, Piece, WeightHomes, cut_layer
from moegen.memory.weight_stream import StreamedExperts, WeightStream
from moegen.ops.expert_weights import ExpertGroup
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")
EXPERTS, GROUP, LAYERS = 7, 2, 3  # four pieces a layer, the last of one expert
COUNTS = [3] * EXPERTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("stream"), seed=2, num_experts=EXPERTS, num_hidden_layers=LAYERS, hidden_size=64,
        moe_intermediate_size=48, dtype="bfloat16",
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[tuple[Checkpoint, dict[str, ExpertSource]]]:
    with Checkpoint(folder) as checkpoint:
        yield checkpoint, checkpoint.load_dense(torch.float32, CPU)[1]


@contextmanager
def streaming(
    opened: tuple[Checkpoint, dict[str, ExpertSource]], *, resident: int = 0, host: int = 0, depth: int = 0,
    slots: int | None = None, readers: int = 2, dtype: torch.dtype = torch.float32,
) -> Iterator[SimpleNamespace]:  # fmt: skip
    _, sources = opened
    arithmetic = Arithmetic(CPU, dtype)
    with (
        DirectFiles() as files,
        WeightHomes.settle(
            sources, files, arithmetic, group_experts=GROUP, resident_groups=resident, host_groups=host, readers=2
        ) as homes,
        WeightStream(homes, files, slots=slots or depth + 1, depth=depth, readers=readers) as stream,
    ):
        pieces = [piece for layer in sources for piece in cut_layer(layer, EXPERTS, GROUP)]
        yield SimpleNamespace(stream=stream, homes=homes, pieces=pieces, files=files)


def answers(group: ExpertGroup, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the lent matrices do to fixed rows."""
    rows = sum(counts)
    generator = torch.Generator().manual_seed(rows)
    x_SI = torch.randn(rows, group.up.in_features, generator=generator)
    y_SI = torch.randn(rows, group.down.in_features, generator=generator)
    return group.up.linear(x_SI, counts), group.down.linear(y_SI, counts)


def expected(reference: PreTrainedModel, piece: Piece, counts: Sequence[int]) -> list[torch.Tensor]:
    module = reference.get_submodule(piece.layer)
    out = []
    for weight_EOI in (module.gate_up_proj, module.down_proj):
        own = weight_EOI[piece.first : piece.first + piece.experts].detach()
        rows = sum(counts)
        generator = torch.Generator().manual_seed(rows)
        x_SU = torch.randn(rows, module.gate_up_proj.shape[2], generator=generator)
        x_SD = torch.randn(rows, module.down_proj.shape[2], generator=generator)
        x_SI = x_SU if weight_EOI is module.gate_up_proj else x_SD
        out.append(torch.cat([x @ w.T for x, w in zip(x_SI.split(list(counts)), own, strict=True)]))
    return out


def check(group: ExpertGroup, reference: PreTrainedModel, piece: Piece, counts: Sequence[int] | None = None) -> None:
    assert (group.first, group.experts) == (piece.first, piece.experts)
    counts = counts or COUNTS[: piece.experts]
    for got, wanted in zip(answers(group, counts), expected(reference, piece, counts), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


ARRANGEMENTS = {
    "resident": {"resident": 4},
    "depth 0": {},
    "depth 1": {"depth": 1},
    "depth 3, one reader": {"depth": 3, "readers": 1},
    "depth 5, many readers, spare slots": {"depth": 5, "readers": 6, "slots": 9},
    "deeper than a pass": {"depth": 20, "readers": 3},
    "some resident": {"resident": 1, "depth": 2},
    "host copies": {"host": 4, "depth": 2, "dtype": torch.bfloat16},
    "three homes": {"resident": 1, "host": 2, "depth": 2, "dtype": torch.bfloat16},
    "host at depth 0": {"host": 3, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("how", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_every_home_and_depth_lends_the_checkpoint(how, opened, reference) -> None:
    reference = reference if how.get("dtype") is None else _Half(reference)
    with streaming(opened, **how) as s:
        for _ in range(3):
            for piece in s.pieces:
                with s.stream.take(piece) as group:
                    check(group, reference, piece) if how.get("dtype") is None else check_exact(group, reference, piece)


class _Half:
    """Plain matrices can be compared as they are."""

    def __init__(self, reference: PreTrainedModel) -> None:
        self.get_submodule = reference.get_submodule


def check_exact(group: ExpertGroup, reference: _Half, piece: Piece) -> None:
    module = reference.get_submodule(piece.layer)
    for matrix, weight_EOI in ((group.up, module.gate_up_proj), (group.down, module.down_proj)):
        held = matrix._matrix if hasattr(matrix, "_matrix") else matrix
        own = weight_EOI[piece.first : piece.first + piece.experts].bfloat16()
        assert torch.equal(held.weight_EOI[: piece.experts], own)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_takes_announcements_and_skips(seed: int, opened, reference) -> None:
    dice = random.Random(seed)
    depth = dice.choice([0, 1, 2, 4])
    how = {
        "depth": depth,
        "slots": depth + dice.choice([1, 2]),
        "readers": dice.choice([1, 3]),
        "resident": dice.choice([0, 1]),
    }
    with streaming(opened, **how) as s:
        for _ in range(60):
            match dice.randrange(8):
                case 0:
                    s.stream.announce(dice.sample(s.pieces, dice.randrange(len(s.pieces) + 1)))
                case 1:
                    s.stream.skip(dice.sample(s.pieces, 3))
                case 2:
                    time.sleep(0.002)
            piece = dice.choice(s.pieces)
            used = {e for e in range(piece.first, piece.first + piece.experts) if dice.random() < 0.6}
            counts = [2 if e in used else 0 for e in range(piece.first, piece.first + piece.experts)]
            with s.stream.take(piece, used if dice.random() < 0.5 else None) as group:
                check(group, reference, piece, counts if used else None) if used else None


def test_read_ahead_is_there_when_it_is_taken(opened) -> None:
    with streaming(opened, depth=3) as s:
        for piece in s.pieces:
            _settle(s.stream)
            before = s.stream.figures
            with s.stream.take(piece):
                pass
            assert s.stream.figures.waited_seconds - before.waited_seconds < 0.05
            assert s.stream._fills.keys() <= set(s.pieces)
        _settle(s.stream)
        moved = s.stream.figures.disk_bytes
        assert moved <= sum(r.nbytes for requests in s.homes.disk.values() for r in requests) * (1 + 5 / len(s.pieces))


def _pass(s: SimpleNamespace) -> None:
    for piece in s.pieces:
        with s.stream.take(piece):
            pass


def _settle(stream: WeightStream) -> None:
    """Until nothing is left to read ahead."""
    with stream._changed:
        done = stream._changed.wait_for(lambda: all(fill.settled for fill in stream._fills.values()), timeout=10)
    assert done


def test_every_piece_is_read_once_a_pass(opened) -> None:
    for depth in (0, 2):
        with streaming(opened, depth=depth) as s:
            a_pass = sum(r.nbytes for requests in s.homes.disk.values() for r in requests)
            for _ in range(3):
                for piece in s.pieces:
                    with s.stream.take(piece):
                        pass
            _settle(s.stream)
            ahead = s.stream.figures.disk_bytes - 3 * a_pass
            assert 0 <= ahead <= a_pass * (depth + 1) / len(s.pieces) * 2, depth


def test_only_used_experts_are_read(opened, reference, monkeypatch) -> None:
    monkeypatch.setattr(read_request, "_ENOUGH_BYTES", 0)  # as if these experts were large
    with streaming(opened) as s:
        layer = StreamedExperts(s.stream, tuple(s.pieces[:4]))
        counts = [0, 0, 5, 0, 0, 0, 2]
        lent = [group.first for group in _each(layer, counts, reference, s.pieces)]
        assert lent == [2, 6]
        one = s.homes.sources[s.pieces[0].layer].nbytes(1)
        assert s.stream.figures.disk_bytes == 2 * one


def _each(layer: StreamedExperts, counts: list[int], reference, pieces) -> Iterator[ExpertGroup]:
    for group in layer.lend(counts):
        piece = next(p for p in layer.pieces if p.first == group.first)
        check(group, reference, piece, counts[piece.first : piece.first + piece.experts])
        yield group


def test_popular_experts_are_read_ahead_first_where_some_meet_no_token(opened, monkeypatch) -> None:
    monkeypatch.setattr(read_request, "_ENOUGH_BYTES", 0)  # as if these experts were large
    with streaming(opened) as s:
        piece = s.pieces[0]  # of experts 0 and 1

        def first_read() -> set[int]:
            return set(next(iter(s.stream._popular_first(piece))).experts)

        stored_first = first_read()
        s.stream.note(piece.layer, [9, 9] + [0] * (EXPERTS - 2))
        assert first_read() == stored_first
        for _ in range(8):
            s.stream.note(piece.layer, [0, 2] + [0] * (EXPERTS - 2))
        assert first_read() == {1}
        for _ in range(8):
            s.stream.note(piece.layer, [1, 0] + [0] * (EXPERTS - 2))
        assert first_read() == {0}


def test_what_was_left_out_is_read_when_it_is_needed(opened, reference) -> None:
    with streaming(opened, depth=2) as s:
        for used in ({0}, {1}, {0, 1}, None):
            with s.stream.take(s.pieces[0], used) as group:
                counts = [3 if used is None or e in used else 0 for e in (0, 1)]
                check(group, reference, s.pieces[0], counts)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes every read of a file take as long as told."""
    real = os.preadv

    def set_(seconds: float) -> None:
        def preadv(fd: int, into: list[memoryview], offset: int) -> int:
            time.sleep(seconds)
            return real(fd, into, offset)

        monkeypatch.setattr(direct_read.os, "preadv", preadv)

    return set_


def test_slow_readers_delay_and_harm_nothing(opened, reference, slow) -> None:
    with streaming(opened, depth=2) as s:
        slow(0.02)
        for piece in s.pieces:
            with s.stream.take(piece) as group:
                check(group, reference, piece)
        assert s.stream.figures.waited_seconds > 0.05
        assert s.stream.figures.busy_seconds > 0.05


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("bad", [0, 1, 5, 11])
def test_a_failed_read_surfaces_at_its_piece(bad: int, depth: int, opened, reference, monkeypatch) -> None:
    layer, first = list(opened[1])[bad // 4], bad % 4 * GROUP
    failing = set(opened[1][layer].requests(first, min(GROUP, EXPERTS - first)))
    real = DirectFiles.read

    def read(self: DirectFiles, path: str, start: int, nbytes: int, buffer: ReadBuffer) -> torch.Tensor:
        if any((r.start, r.nbytes) == (start, nbytes) for r in failing):
            raise StorageError(f"{path}: cannot be read at byte {start}")
        return real(self, path, start, nbytes, buffer)

    monkeypatch.setattr(DirectFiles, "read", read)
    with streaming(opened, depth=depth) as s:
        with s.stream.take(s.pieces[bad - 6]):  # out of order: throws away what was being read
            pass
        for index, piece in enumerate(s.pieces):
            if index == bad:
                for _ in range(2):
                    with pytest.raises(StorageError, match="cannot be read at byte"), s.stream.take(piece):
                        pass
                failing.clear()
            with s.stream.take(piece) as group:
                check(group, reference, piece)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_file_cut_during_the_run_ends_it_by_name(depth: int, tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "cut", num_experts=EXPERTS, num_hidden_layers=LAYERS)
    with Checkpoint(folder) as checkpoint:
        sources = checkpoint.load_dense(torch.float32, CPU)[1]
        os.truncate(folder / "model.safetensors", 20_000)
        with streaming((checkpoint, sources), depth=depth) as s:
            with pytest.raises(StorageError, match=r"model\.safetensors: ends at byte 20000 .* run the job again"):
                _pass(s)
            with pytest.raises(StorageError, match="ends at byte"):  # and not a hang
                _pass(s)


def test_closing_ends_the_threads_in_the_middle_of_a_pass(opened, slow) -> None:
    before = set(threading.enumerate())
    slow(0.05)
    with streaming(opened, depth=4, readers=3) as s, s.stream.take(s.pieces[0]):
        assert len(set(threading.enumerate()) - before) == 3
        started = time.monotonic()
        s.stream.close()
    assert time.monotonic() - started < 1
    assert set(threading.enumerate()) <= before
    with pytest.raises(ValueError, match="closed"), s.stream.take(s.pieces[1]):
        pass


def test_closing_wakes_a_take_that_waits(opened, monkeypatch) -> None:
    hold, told = threading.Event(), []
    real = os.preadv

    def preadv(fd: int, into: list[memoryview], offset: int) -> int:
        hold.wait(10)
        return real(fd, into, offset)

    def take(stream: WeightStream, piece: Piece) -> None:
        try:
            with stream.take(piece):
                told.append("lent")
        except ValueError as error:
            told.append(str(error))

    with streaming(opened, depth=1, readers=1) as s:
        monkeypatch.setattr(direct_read.os, "preadv", preadv)
        taker = threading.Thread(target=take, args=(s.stream, s.pieces[7]))
        taker.start()
        time.sleep(0.05)
        closer = threading.Thread(target=s.stream.close)
        closer.start()
        taker.join(5)
        assert told == ["the weight stream is closed"]
        hold.set()
        closer.join(5)
        assert not closer.is_alive()


def test_more_lent_than_slots_is_refused(opened) -> None:
    with (
        streaming(opened) as s,
        s.stream.take(s.pieces[0]),
        pytest.raises(ValueError, match="every slot is lent"),
        s.stream.take(s.pieces[1]),
    ):
        pass
    with pytest.raises(ValueError, match="2 slots cannot hold"), streaming(opened, depth=2, slots=2):
        pass


def test_slots_and_homes_take_the_memory_they_say(opened) -> None:
    with streaming(opened, resident=1, depth=2) as s:
        source = next(iter(s.homes.sources.values()))
        group = s.homes.arithmetic.empty_group(source, 0, GROUP).nbytes
        assert s.stream.slot_bytes == 3 * group
        assert sum(g.nbytes for g in s.homes.device.values()) == LAYERS * group
        assert len(s.homes.disk) == LAYERS * 3
        assert s.homes.streamed == tuple(p for p in s.pieces if p.first)

"""Rates of the machine itself: its memory, the link to its device, its disk."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moegen.memory.direct_read import READ_BYTES, DirectFiles, ReadBuffer
from moegen.ops.expert_weights import expert_matrix
from moegen.ops.link import Link
from moegen.run.timing import usual, usual_seconds

_BLOCK_BYTES = 256 << 20
_DISK_BYTES = 256 << 20  # of a checkpoint, at least
_DISK_SECONDS, _DISK_BURST_SECONDS = 0.5, 6
_TEMPORARY_BYTES = 256 << 20
_PAGE_BYTES, _GATHERED_BYTES = 64 << 10, 64 << 20  # of one page in one layer, and of many pages
_PLACED = (4, 1024, 1024)  # experts, output features, input features


def dram_read_bytes_per_s() -> float:
    """Reads by all cores."""
    block = torch.ones(_BLOCK_BYTES // 4)
    return _BLOCK_BYTES / usual_seconds(block.sum, torch.device("cpu"))


def link_bytes_per_s(device: torch.device) -> dict[str, float]:
    """Both ways, and to the device while the host's cores read memory; by the names that `Rates` has for them."""
    host = torch.ones(_BLOCK_BYTES // 4).pin_memory()
    there = host.to(device)
    block = torch.ones(_BLOCK_BYTES // 4)
    seconds = {
        "h2d_bytes_per_s": usual_seconds(lambda: there.copy_(host, non_blocking=True), device),
        "d2h_bytes_per_s": usual_seconds(lambda: host.copy_(there, non_blocking=True), device),
    }
    return {name: _BLOCK_BYTES / each for name, each in seconds.items()} | _together(host, there, block)


def _together(host: torch.Tensor, there: torch.Tensor, block: torch.Tensor) -> dict[str, float]:
    """The link and the host's reads at once: each goes on for as long as the other, about half a second."""
    copies = reads = 0
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started = time.perf_counter()
    begin.record()
    while time.perf_counter() - started < 0.5:
        there.copy_(host, non_blocking=True)
        there.copy_(host, non_blocking=True)
        copies += 2
        while not torch.cuda.current_stream().query():
            block.sum()
            reads += 1
    end.record()
    torch.cuda.synchronize()
    read_s = time.perf_counter() - started
    return {
        "h2d_beside_dram_bytes_per_s": copies * _BLOCK_BYTES / (begin.elapsed_time(end) / 1e3),
        "dram_beside_h2d_bytes_per_s": reads * _BLOCK_BYTES / read_s,
    }


@torch.inference_mode()
def gather_bytes_per_s(device: torch.device) -> float:
    """Pages of keys and values from all over the host's memory to the device, as attention there wants them."""
    table = torch.ones(_BLOCK_BYTES // _PAGE_BYTES, _PAGE_BYTES // 4)
    ids_N = np.random.default_rng(0).permutation(len(table))[: max(_GATHERED_BYTES // _PAGE_BYTES, 1)]
    link = Link(device)
    return len(ids_N) * _PAGE_BYTES / usual_seconds(lambda: link.rows_to_device((table,), ids_N), device)


def place_bytes_per_s(dtype: torch.dtype, rounded: bool) -> float:
    """What one thread packs of an expert's stored rows into the form in which a CPU multiplies them: `PanelMatrix`."""
    experts, rows, columns = _PLACED
    stored = torch.zeros(rows, columns, dtype=dtype)
    matrix = expert_matrix(experts, rows, columns, dtype, torch.float32, torch.device("cpu"), rounded)

    def place() -> None:
        for expert in range(experts):
            matrix.place(expert, 0, stored)

    return experts * stored.nbytes / usual_seconds(place, torch.device("cpu"))


def disk_bytes_per_s(model_uri: str | None, threads: tuple[int, ...]) -> dict[int, float]:
    """Direct reads at each number of threads: of the model's own files, or of a temporary one."""
    files = [] if model_uri is None else _checkpoint_files(model_uri)
    if files:
        return _read_rates(files, threads)
    with tempfile.NamedTemporaryFile(prefix="moegen-probe-") as file:
        block = bytes(READ_BYTES)
        for _ in range(_TEMPORARY_BYTES // READ_BYTES):
            file.write(block)
        file.flush()
        return _read_rates([Path(file.name)], threads)


def _checkpoint_files(model_uri: str) -> list[Path]:
    """Of a local checkpoint, when it is large enough to say anything."""
    every = sorted(Path(model_uri.removeprefix("file://")).glob("*.safetensors"))
    files = [path for path in every if path.stat().st_size >= READ_BYTES]
    return files if sum(path.stat().st_size for path in files) >= _DISK_BYTES else []


def _read_rates(paths: Sequence[Path], threads: tuple[int, ...]) -> dict[int, float]:
    """From one end to the other and round again, as a job reads: what is read over and over may be in a cache that
    the whole is too large for."""
    with DirectFiles() as files, ThreadPoolExecutor(max(threads)) as pool:
        blocks = itertools.cycle(
            [(str(path), start) for path in paths
             for start in range(0, path.stat().st_size - READ_BYTES + 1, READ_BYTES)]
        )  # fmt: skip
        lock, buffers = threading.Lock(), [ReadBuffer(READ_BYTES) for _ in range(max(threads))]

        def read(buffer: ReadBuffer, until: float) -> int:
            done = 0
            while not done or time.perf_counter() < until:
                with lock:
                    path, start = next(blocks)
                done += len(files.read(path, start, READ_BYTES, buffer))
            return done

        def rate(count: int, seconds: float = _DISK_SECONDS) -> float:
            started = time.perf_counter()
            done = sum(pool.map(partial(read, until=started + seconds), buffers[:count]))
            return done / (time.perf_counter() - started)

        rate(max(threads), _DISK_BURST_SECONDS)  # a shared disk gives more after a rest than it goes on giving
        return usual({count: partial(rate, count) for count in threads})

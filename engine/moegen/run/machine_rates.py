"""Rates of the machine itself: its memory, the link to its device, its disk."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from moegen.memory.direct_read import DirectFile, ReadBuffer
from moegen.ops.expert_weights import expert_matrix
from moegen.ops.link import Link
from moegen.run.timing import usual_seconds

_BLOCK_BYTES = 256 << 20
_READ_BYTES = 8 << 20
_DISK_BYTES = 256 << 20  # of a file, read again and again for so long, at each number of threads
_DISK_SECONDS = 1.5
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
    """Direct reads at each number of threads: of the model's own largest file, or of a temporary one."""
    own = _largest_file(model_uri) if model_uri is not None else None
    if own is not None:
        return {count: _read_rate(own, count) for count in threads}
    with tempfile.NamedTemporaryFile(prefix="moegen-probe-") as file:
        block = bytes(_READ_BYTES)
        for _ in range(_TEMPORARY_BYTES // _READ_BYTES):
            file.write(block)
        file.flush()
        return {count: _read_rate(Path(file.name), count) for count in threads}


def _largest_file(model_uri: str) -> Path | None:
    """Of a local checkpoint, when it is large enough to say anything."""
    files = sorted(Path(model_uri.removeprefix("file://")).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    return files[-1] if files and files[-1].stat().st_size >= _DISK_BYTES else None


def _read_rate(path: Path, threads: int) -> float:
    """Over and over, for a while: a shared disk gives more at first than it goes on giving."""
    size = path.stat().st_size
    starts = list(range(0, min(size, _DISK_BYTES) - _READ_BYTES + 1, _READ_BYTES))
    with DirectFile(path) as file, ThreadPoolExecutor(threads) as pool:
        buffers = [ReadBuffer(_READ_BYTES) for _ in range(threads)]
        started = time.perf_counter()

        def read(number: int) -> int:
            blocks, own = 0, starts[number::threads] or starts
            while not blocks or time.perf_counter() - started < _DISK_SECONDS:
                file.read(own[blocks % len(own)], _READ_BYTES, buffers[number])
                blocks += 1
            return blocks

        blocks = sum(pool.map(read, range(threads)))
        return blocks * _READ_BYTES / (time.perf_counter() - started)

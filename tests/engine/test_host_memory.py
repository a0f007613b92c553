"""Memory is there when it is asked for, and what is in it stays."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch
from moegen.memory.kv_pool import KVPool, KVShape
from moegen.ops.host_memory import host_zeros, make_present
from moegen.plan.workload import Workload
from moegen.units import MIB

from tests.engine.parts import plan

RELEASE = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdigit())
populates = pytest.mark.skipif(
    platform.system() != "Linux" or RELEASE < (5, 14), reason="this system cannot be asked for memory ahead of its use"
)


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


@populates
def test_memory_is_there_before_it_is_touched_and_keeps_its_contents():
    memory = host_zeros((96 * MIB,), torch.uint8)
    memory[5], memory[-1] = 7, 9
    before = resident_bytes()
    make_present([memory[3:]], threads=2)
    assert resident_bytes() - before > 80 * MIB
    assert (memory[5], memory[-1], int(memory.sum(dtype=torch.int64))) == (7, 9, 16)


@populates
def test_only_the_first_pages_of_every_layer():
    shapes = {name: KVShape(4, 64, 64) for name in "ab"}
    page_bytes = 2 * 4 * 32 * 64 * 2
    pool = KVPool(shapes, 256 * MIB // (2 * page_bytes), 32, torch.bfloat16, torch.device("cpu"))
    before = resident_bytes()
    pool.make_present(64 * MIB // (2 * page_bytes), threads=2)
    assert 48 * MIB < resident_bytes() - before < 100 * MIB


@pytest.mark.parametrize(("rows", "pages"), [(1, 3), (10, 30), (100_000, 64)])
def test_as_many_as_a_job_uses_at_once(rows, pages):
    """Sequences of 17 to 23 tokens while they run: three pages of 8 each."""
    workload = Workload.of(rows, (16,), (8,))
    assert workload.steady_pages(plan(kv_pages=64, page_tokens=8, pass_tokens=64)) == pages

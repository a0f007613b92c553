"""A device that refuses memory gets smaller micro-batches, and the answers do not know."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from moegen.errors import BudgetError
from moegen.memory.weight_home import WeightHomes
from moegen.ops.micro_batch import MicroBatch
from moegen.run.engine import Engine
from moegen.schedule.sequence import Request
from moegen.spec import Sampling

from tests.engine.parts import plan, run
from tests.engine.small_device import SmallDevice
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# Attention is eight times as wide as the hidden state: what does not fit is a stage's own, not the whole pass's.
WIDE = {"num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 3}
SIZES = {"attention_tokens": 128, "expert_tokens": 600, "pass_tokens": 200, "kv_pages": 200, "logit_tokens": 8}
# A pass of 200 tokens has 25,600 bytes of hidden state, its queries are 204,800, between its experts' products 230,400.
MOST_BYTES = 40_000
STREAMED = {"groups": 4, "group_experts": 1, "resident_groups": 1, "stream_slots": 2, "stream_depth": 1,
            "reader_threads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("wide"), seed=3, **WIDE)


def requests() -> list[Request]:
    return [
        Request(row, tuple((7 * row + i) % 250 for i in range(5 + row % 3 * 40)), Sampling(max_tokens=3 + row % 7))
        for row in range(20)
    ]


def opened(checkpoint: Path, *, staged: bool = True, **sizes: Any) -> Engine:
    return Engine.load(checkpoint, plan(**{**SIZES, **sizes}), staged=staged, tokenizer=None)


def halvings(records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records if "from now on" in record.getMessage()]


@pytest.mark.parametrize(
    ("staged", "homes"), [(True, {}), (True, STREAMED), (False, {})], ids=["staged", "streamed", "whole layers"]
)
def test_a_refused_allocation_halves_and_goes_on(
    staged: bool, homes: dict[str, int], checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(checkpoint, staged=staged) as engine:
        expected, _ = run(engine, requests())
    assert not halvings(caplog.records)
    # Layers that run whole bring all queries of the pass at once; only what attention makes of them is micro-batched.
    most_bytes = MOST_BYTES if staged else 220_000
    with opened(checkpoint, staged=staged, **homes) as engine:
        with SmallDevice(most_bytes) as device:
            answers, passes = run(engine, requests())
        assert answers == expected
        assert max(report.tokens for report in passes) > 100
        told = halvings(caplog.records)
        assert device.refusals == len(told) > 0
        assert any("expert stage" in line for line in told)
        assert any("attention stage" in line for line in told) == staged
        with SmallDevice(most_bytes) as device:  # what was learnt is kept
            again, _ = run(engine, requests())
        assert (again, device.refusals) == (expected, 0)


def test_halved_from_what_was_tried_not_from_what_was_allowed() -> None:
    """Ten tokens do not become fewer when 2,048 allowed ones become 1,024."""
    tried = []

    def work(most: int) -> str:
        tried.append(most)
        if most > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nmore")
        return "done"

    batch = MicroBatch(2048, "attention")
    assert batch.run(work, 10) == "done"
    assert (tried, batch.tokens) == ([10, 5, 2], 2)
    assert batch.run(work, 10) == "done"
    assert tried[3:] == [2]


def test_not_even_one_token(checkpoint: Path) -> None:
    with (
        opened(checkpoint) as engine,
        SmallDevice(700),
        pytest.raises(BudgetError, match=r"engine\.device_memory: there is no room for the attention of a single"),
    ):
        run(engine, [Request(0, (1,), Sampling(max_tokens=1))])


def test_a_model_that_finds_no_room_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = WeightHomes.settle

    def on_a_small_device(*arguments: Any, **options: Any) -> WeightHomes:
        with SmallDevice(10_000):  # the experts of a layer have more
            return settle(*arguments, **options)

    monkeypatch.setattr(WeightHomes, "settle", on_a_small_device)
    with pytest.raises(BudgetError, match=r"engine\.device_memory: .*Tried to allocate"):
        opened(checkpoint, compute_dtype="bfloat16")  # plain matrices, as on a device: panels are mapped, not allocated


def test_other_errors_pass() -> None:
    def work(most: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    batch = MicroBatch(8, "expert")
    with pytest.raises(RuntimeError, match="illegal"):
        batch.run(work, 8)
    assert batch.tokens == 8

"""Parts that several tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moegen.plan.plan import MemoryUse, Plan
from moegen.run.engine import Engine
from moegen.run.stats import PassReport
from moegen.schedule.sequence import Finished, Request


def plan(**sizes: Any) -> Plan:
    """A float32 plan on the CPU; `sizes` are fields of `Plan`."""
    usual = {
        "device": "cpu", "threads": 1, "compute_dtype": "float32", "expert_dtype": "float32", "kv_dtype": "float32",
        "attention_tokens": 64, "expert_tokens": 64, "pass_tokens": 64, "logit_tokens": 64, "page_tokens": 8,
        "kv_pages": 64, "kv_home": "host", "attention_on_host": 1.0, "groups": 1, "group_experts": 1 << 20,
        "resident_groups": 1, "host_groups": 0, "stream_slots": 0, "stream_depth": 0, "reader_threads": 0,
        "state_slots": 64, "host": MemoryUse(), "device_memory": MemoryUse(),
    }  # fmt: skip
    return Plan(**{**usual, "level_tokens": sizes.get("pass_tokens", 64), **sizes})


def run(engine: Engine, requests: Iterable[Request]) -> tuple[dict[int, Finished], list[PassReport]]:
    """All rows by their index, and the reports of the passes."""
    items = list(engine.generate(requests))
    finished = [item for item in items if isinstance(item, Finished)]
    rows = {item.row_index: item for item in finished}
    assert len(rows) == len(finished), "a row ended twice"
    return rows, [item for item in items if isinstance(item, PassReport)]

"""What the device answers, beside what a CPU does: tiny models of several families, and one through every weight home.

Logits are compared with transformers' own forward in float32 on a CPU, over passes that mix chunked prompts and decode;
greedy tokens with the engine's on a CPU. bfloat16 is measured, not judged.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.plan.search import choose_plan
from moegen.run.certify import TOLERANCE, certify, engine_model, logit_difference, tiny_reference
from moegen.run.engine import Engine
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import PlanOverrides, Sampling
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.gpu_suite.setting import Desk

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe")
_LACKING = {"deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2}}
_ROWS, _ANSWER = 12, 16
_SIZES = PlanOverrides(attention_tokens=8, expert_tokens=23, pass_tokens=17, page_tokens=4, kv_pages=60,
                       group_experts=2)  # fmt: skip
_ON_HOST = (0.0, 0.5, 1.0)


def rows(vocabulary: int) -> list[Request]:
    dice = torch.Generator().manual_seed(3)
    return [
        Request(row, tuple(torch.randint(3, vocabulary, (1 + row * 3,), generator=dice).tolist()),
                Sampling(max_tokens=_ANSWER, ignore_eos=True))
        for row in range(_ROWS)
    ]  # fmt: skip


def answers(engine: Engine, vocabulary: int) -> list[tuple[int, ...]]:
    found = {item.row_index: item.token_ids for item in engine.generate(rows(vocabulary)) if isinstance(item, Finished)}
    return [found[row] for row in range(_ROWS)]


def agreement(mine: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> dict[str, float]:
    """Rows that are equal, and the share of tokens up to each row's first difference."""
    pairs = list(zip(mine, other, strict=True))
    same = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs)
    return {"rows": sum(a == b for a, b in pairs) / len(pairs), "tokens": same / sum(map(len, mine))}


def plan_for(folder: Path, device: str, dtype: str, **changes: Any) -> Plan:
    plan = choose_plan(
        ModelShape.read(str(folder)), Machine.detect(device), EngineSpec(device=device, plan=_SIZES), dtype
    )
    return replace(plan, threads=1, compute_dtype=dtype, expert_dtype=dtype, kv_dtype=dtype, **changes)


def family_result(reference: PreTrainedModel, way: str, device: str) -> dict[str, Any]:
    """Logit differences on the device, relative to the largest logit."""
    staged = way == "staged"
    found: dict[str, Any] = {"way": way}
    exact = engine_model(reference, staged=staged, device=device)
    found["float32"] = logit_difference(exact, reference)
    found["float32, pages on the host"] = {str(share): logit_difference(exact, reference, share) for share in _ON_HOST}
    half = {"device": device, "CPU": "cpu"}  # large where one token goes to another expert for it
    found["bfloat16"] = {
        name: logit_difference(engine_model(reference, staged=staged, device=where, dtype=torch.bfloat16), reference)
        for name, where in half.items()
    }
    worst = max(found["float32"], *found["float32, pages on the host"].values())
    return {**found, "equal": worst <= TOLERANCE}


def arrangements(device: str) -> dict[str, dict[str, Any]]:
    """Where experts and pages live. A CPU has one memory: nothing is on a host beside it."""
    streamed = {"stream_slots": 2, "stream_depth": 1, "reader_threads": 2}
    found: dict[str, dict[str, Any]] = {
        "resident": {"resident_groups": 4, "host_groups": 0, "stream_slots": 0, "stream_depth": 0},
        "disk": {"resident_groups": 0, "host_groups": 0, **streamed},
        "disk, depth 0": {"resident_groups": 0, "host_groups": 0, **streamed, "stream_depth": 0},
        "some resident": {"resident_groups": 2, "host_groups": 0, **streamed},
    }
    if device != "cpu":
        found["host"] = {"resident_groups": 0, "host_groups": 4, **streamed}
        found["three homes"] = {
            "resident_groups": 1,
            "host_groups": 2,
            **streamed,
            "stream_slots": 4,
            "stream_depth": 3,
        }
        for share in _ON_HOST:
            found[f"host, pages too, {share} attended there"] = {
                **found["host"], "kv_home": "host", "attention_on_host": share,
            }  # fmt: skip
    return {name: {"groups": 4, "group_experts": 2, **how} for name, how in found.items()}


def home_results(reference: PreTrainedModel, way: str, device: str) -> dict[str, Any]:
    """Greedy tokens from a checkpoint, through every arrangement, beside the CPU's with everything resident."""
    vocabulary, found = reference.config.get_text_config().vocab_size, {}
    resident = arrangements("cpu")["resident"]
    with tempfile.TemporaryDirectory(prefix="moegen-bench-tiny-") as name:
        folder = Path(name)
        reference.save_pretrained(folder)

        def run(where: str, dtype: str, how: dict[str, Any]) -> list[tuple[int, ...]]:
            plan = plan_for(folder, where, dtype, **how)
            with Engine.load(folder, plan, staged=way == "staged", tokenizer=None) as engine:
                return answers(engine, vocabulary)

        expected = run("cpu", "float32", resident)
        for label, how in arrangements(device).items():
            found[label] = agreement(run(device, "float32", how), expected)
        half = run("cpu", "bfloat16", resident)
        found["bfloat16 beside the CPU's bfloat16"] = agreement(run(device, "bfloat16", resident), half)
        found["bfloat16 beside float32"] = agreement(run(device, "bfloat16", resident), expected)
    judged = [result for label, result in found.items() if "bfloat16" not in label]
    return {**found, "equal": all(result["rows"] == 1 for result in judged)}


def main() -> None:
    desk = Desk()
    torch.set_num_threads(1)
    device, found = desk.setting.device, {}
    families = FAMILIES[:2] if desk.setting.tiny else FAMILIES
    for family in families:
        config = CONFIG_MAPPING[family](**_LACKING.get(family, {}))
        way, reference = certify(config), tiny_reference(config)
        found[family] = family_result(reference, way, device)
        desk.note(families=found)
        if family == "qwen3_moe":
            homes = home_results(reference, way, device)
            desk.note(homes=homes)
    desk.note(equal=all(result["equal"] for result in [*found.values(), homes]))


if __name__ == "__main__":
    main()

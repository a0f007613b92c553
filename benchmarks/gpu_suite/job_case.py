"""A whole model of random weights through the engine in its steady state, within memory caps.

choice: `geometry` (mixtral or qwen3); `device_memory` (as in 24GiB) or None; `prompt`, `answer` tokens; `model_based`:
restricted to model-based batching, in passes of so few tokens: attention and experts in one batch, keys and values on
the device, as engines do that put one batch through the whole model.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from moegen.errors import BudgetError
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.plan.predict import Prediction, predict
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.run.engine import Engine
from moegen.run.figures import Yardstick
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import PlanOverrides
from moegen.units import parse_bytes

from benchmarks.gpu_suite.bound import capacity_bound, traffic_bound
from benchmarks.gpu_suite.probe_case import device_memory_bytes_per_s
from benchmarks.gpu_suite.random_checkpoint import geometry, write_checkpoint
from benchmarks.gpu_suite.setting import Desk, Setting
from benchmarks.gpu_suite.steady import Steady, run_steady, seconds_of_a_full_pass

_HOST_SHARE = 0.92  # of what is free
_SPARE_S = 12.0  # to end in
_PASS_TOKENS = 8192  # so that the first prompts are through in time; a pass of the steady state has fewer
_ENOUGH_PASSES, _ENOUGH_TINY = 64, 12
_ENOUGH_FULL_PASSES = 16  # all alike
_TINY = {"pass_tokens": 512, "kv_pages": 64}


def choose(setting: Setting, shape: ModelShape, machine: Machine, work: Workload) -> tuple[Plan, Prediction | None]:
    """The planner's own plan; with keys and values where it predicts more."""
    choice = setting.choice
    model_based = choice.get("model_based")
    pass_tokens = model_based or (_TINY["pass_tokens"] if setting.tiny else _PASS_TOKENS)
    homes = ["device"] if machine.device == "cpu" or model_based else ["device", "host"]
    found: list[tuple[Plan, Prediction | None]] = []
    refusals: list[BudgetError] = []
    for home in homes:
        fixed = PlanOverrides(
            kv_home=home,  # type: ignore[arg-type]
            pass_tokens=pass_tokens,
            attention_tokens=model_based,
            kv_pages=_TINY["kv_pages"] if setting.tiny else None,
        )
        asked = EngineSpec(
            device=setting.device, host_memory=str(_host_budget(machine)), device_memory=choice["device_memory"],
            plan=fixed,
        )  # fmt: skip
        try:
            plan = choose_plan(shape, machine, asked, "auto", work)
        except BudgetError as error:
            refusals.append(error)
            continue
        found.append((plan, _predicted(shape, machine, plan, work)))
    if not found:
        raise refusals[0]
    return max(found, key=lambda each: each[1].steady_tokens_per_s if each[1] else 0.0)


def _predicted(shape: ModelShape, machine: Machine, plan: Plan, work: Workload) -> Prediction | None:
    if not machine.rates.measured:
        return None
    footprint = Footprint(shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype, latent_kv=plan.latent_kv)
    return predict(footprint, plan, machine.rates, work)


def _host_budget(machine: Machine) -> int:
    return int(machine.host_memory_bytes * _HOST_SHARE)


def main() -> None:
    desk = Desk()
    setting, choice = desk.setting, desk.setting.choice
    device = torch.device(setting.device)
    folder = Path(setting.scratch) / choice["geometry"]
    if not (folder / "config.json").exists():
        write_checkpoint(folder, geometry(choice["geometry"], setting.tiny), device)
    machine, shape = setting.machine(), ModelShape.read(str(folder))
    work = Workload.of(100_000, (choice["prompt"],), (choice["answer"],))
    plan, promised = choose(setting, shape, machine, work)
    desk.note(plan=plan.to_mapping(), predicted_tokens_per_s=promised and promised.steady_tokens_per_s,
              predicted_binding=promised and promised.binding)  # fmt: skip
    own_rate = device_memory_bytes_per_s(device, (1 << 20) if setting.tiny else (1 << 30))
    opening = time.monotonic()
    most = _ENOUGH_TINY if setting.tiny else _ENOUGH_PASSES
    with Engine.open(str(folder), plan, tokenizer=None) as engine:
        desk.note(open_seconds=time.monotonic() - opening)
        if choice.get("model_based"):
            enough = min(most, _ENOUGH_FULL_PASSES)
            one = seconds_of_a_full_pass(engine, choice["prompt"], choice["answer"], desk.until(_SPARE_S), enough)
            if one is None:
                raise SystemExit("the time was over before two passes had been full")
            sampled = float(work.steady_pass(plan).sampled[0])
            desk.note(seconds_of_a_pass=one, sequences=sampled, tokens_per_s=sampled / one)
            return
        steady = run_steady(engine, choice["prompt"], choice["answer"], desk.until(_SPARE_S), most)
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    if steady is None:
        raise SystemExit("the time was over before the first prompts had been computed; give the stage more")
    device_bytes = machine.device_memory_bytes
    if choice["device_memory"]:
        device_bytes = min(parse_bytes(choice["device_memory"], "device_memory"), device_bytes)
    capacity = capacity_bound(shape, machine, _host_budget(machine), device_bytes, own_rate, work)
    traffic = traffic_bound(shape, machine, plan, steady.span, own_rate)
    desk.note(
        **_measured(steady),
        **{f"bound_by_{name}": {**asdict(bound), "binding": bound.binding,
                                "fraction": steady.tokens_per_s / bound.tokens_per_s}
           for name, bound in (("capacity", capacity), ("traffic", traffic))},
        plan_error=promised and promised.steady_tokens_per_s / steady.tokens_per_s - 1,
        figures=asdict(Yardstick(shape, machine, plan).measure(steady.span)),
        allocator_peak_bytes=peak,
        device_memory_bytes_per_s=own_rate,
    )  # fmt: skip


def _measured(steady: Steady) -> dict[str, Any]:
    return {
        "tokens_per_s": steady.tokens_per_s,
        "steady": steady.steady,
        "sequences": steady.sequences,
        "seconds_of_a_pass": steady.span.seconds / steady.span.passes,
        "warm_seconds": steady.warm_seconds,
        "warm_passes": steady.warm_passes,
        "span": asdict(steady.span),
    }


if __name__ == "__main__":
    main()

"""A plan, how fast it will go, and what more memory would give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.plan.predict import Prediction, predict
from moegen.plan.search import choose_plan
from moegen.plan.workload import UNKNOWN, Workload
from moegen.shape import ModelShape
from moegen.spec import Engine
from moegen.units import GIB, parse_bytes


@dataclass(frozen=True)
class Outlook:
    """What `moegen plan` says. Without measured rates, or without knowing the work, only the plan."""

    plan: Plan
    workload: Workload | None = None
    prediction: Prediction | None = None
    host_gib_tokens_per_s: float | None = None  # what one more GiB of host memory would add
    device_gib_tokens_per_s: float | None = None
    few_bits_tokens_per_s: dict[str, float] | None = None  # what plain experts or pages in few bits would add

    @classmethod
    def of(cls, shape: ModelShape, machine: Machine, engine: Engine, dtype: str, workload: Workload | None) -> Outlook:
        """Raises `BudgetError` when nothing fits."""
        plan = choose_plan(shape, machine, engine, dtype, workload or UNKNOWN)
        if workload is None or not machine.rates.measured:
            return cls(plan, workload)

        def with_more(host: int, device: int) -> float:
            return _rate(shape, *_larger(machine, engine, host, device), dtype, workload)

        prediction = _predicted(shape, machine, plan, workload)
        return cls(
            plan,
            workload,
            prediction,
            with_more(GIB, 0) - prediction.generated_tokens_per_s,
            with_more(0, GIB) - prediction.generated_tokens_per_s if machine.device != "cpu" else None,
            {
                name: _rate(other, machine, asked, dtype, workload) - prediction.generated_tokens_per_s
                for name, (other, asked) in _in_few_bits(shape, engine).items()
            }
            or None,
        )

    def to_mapping(self) -> dict[str, Any]:
        """The plan, flat, with the prediction (or null) beside it."""
        return {
            **self.plan.to_mapping(),
            "prediction": None if self.prediction is None else self.prediction.to_mapping(),
            "host_gib_tokens_per_s": self.host_gib_tokens_per_s,
            "device_gib_tokens_per_s": self.device_gib_tokens_per_s,
            "few_bits_tokens_per_s": self.few_bits_tokens_per_s,
        }


def _in_few_bits(shape: ModelShape, engine: Engine) -> dict[str, tuple[ModelShape, Engine]]:
    """What could be made of a model whose experts are plain, and of pages that are."""
    found = {}
    if shape.moe_layers and not shape.in_few_bits:
        found = {
            "model.weights int8": (shape.kept("int8"), engine),
            "a checkpoint in 8 bits": (shape.stored_in(8), engine),
            "a checkpoint in 4 bits": (shape.stored_in(4), engine),
        }
    if engine.plan.kv_dtype == "auto" and not (engine.plan.latent_kv and shape.latent_kv_per_token):
        found["engine.plan.kv_dtype int8"] = shape, replace(engine, plan=replace(engine.plan, kv_dtype="int8"))
    return found


def _rate(shape: ModelShape, machine: Machine, engine: Engine, dtype: str, workload: Workload) -> float:
    """Generated tokens/s that are predicted for the best plan."""
    plan = choose_plan(shape, machine, engine, dtype, workload)
    return _predicted(shape, machine, plan, workload).generated_tokens_per_s


def _predicted(shape: ModelShape, machine: Machine, plan: Plan, workload: Workload) -> Prediction:
    footprint = Footprint(shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype, latent_kv=plan.latent_kv)
    return predict(footprint, plan, machine.rates, workload)


def _larger(machine: Machine, engine: Engine, host: int, device: int) -> tuple[Machine, Engine]:
    """The same with so many more bytes, also in the budgets that the job names."""
    larger = replace(
        machine,
        host_memory_bytes=machine.host_memory_bytes + host,
        device_memory_bytes=machine.device_memory_bytes + device,
    )
    asked = replace(
        engine, host_memory=_plus(engine.host_memory, host), device_memory=_plus(engine.device_memory, device)
    )
    return larger, asked


def _plus(budget: str | None, more: int) -> str | None:
    return None if budget is None else str(parse_bytes(budget, "budget") + more)

"""What a machine allows: engine.md's formula, and the time that what was moved and computed takes at the best rates."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.plan.workload import Workload
from moegen.run.figures import Yardstick
from moegen.run.history import Span
from moegen.shape import DTYPE_BYTES, ModelShape


@dataclass(frozen=True)
class Bound:
    """Generated tokens per second that nothing can exceed, and the seconds of each term, the largest of which binds."""

    tokens_per_s: float
    seconds: dict[str, float]

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.seconds, key=lambda term: self.seconds[term])


def capacity_bound(
    shape: ModelShape, machine: Machine, host_bytes: int, device_bytes: int, device_bytes_per_s: float,
    workload: Workload,
) -> Bound:  # fmt: skip
    """The best that memories of these sizes allow: all of the device for weights, what they leave for keys and values.

    On a CPU device there is one memory, and nothing has to move.
    """
    weight_bytes = shape.weights * DTYPE_BYTES[shape.dtype]
    if machine.device == "cpu":
        host_bytes, device_bytes = 0, host_bytes
    resident = min(weight_bytes, device_bytes)
    moved = weight_bytes - resident
    host_kv, device_kv = max(host_bytes - moved, 0), device_bytes - resident
    kv_per_token = shape.latent_kv_per_token or shape.kv_per_token
    sequence_bytes = kv_per_token * DTYPE_BYTES[shape.dtype] * workload.mean_context
    sequences = (host_kv + device_kv) / sequence_bytes
    tokens = sequences * (1 + workload.mean_prompt / workload.mean_answer)
    rates = machine.rates
    seconds = {
        "device": tokens * shape.flops_per_token / _peak(machine),
        "device memory": (resident + device_kv) / device_bytes_per_s,
        "link": moved / rates.h2d_bytes_per_s if rates.h2d_bytes_per_s else 0.0,
        "DRAM": (moved + host_kv) / (rates.dram_read_bytes_per_s or float("inf")),
    }
    return Bound(sequences / max(seconds.values()), seconds)


def traffic_bound(shape: ModelShape, machine: Machine, plan: Plan, span: Span, device_bytes_per_s: float) -> Bound:
    """For what a run's passes moved and computed, every part at its best measured rate, all at once."""
    yard = Yardstick(shape, machine, plan)
    needed = yard.needed_bytes(span) or {}
    near = "dram" if machine.device == "cpu" else "device"
    rates = machine.rates
    seconds = {
        "device": (yard.flops(span) or 0.0) / _peak(machine),
        "device memory": needed.get(near, 0.0) / device_bytes_per_s,
        "link": (span.link_bytes or 0) / rates.h2d_bytes_per_s if rates.h2d_bytes_per_s else 0.0,
        "disk": (span.disk_bytes or 0) / (yard.peak_disk_bytes_per_s or float("inf")),
    }
    if machine.device != "cpu":
        read = (span.link_bytes or 0) + needed.get("dram", 0.0)
        seconds["DRAM"] = read / (rates.dram_read_bytes_per_s or float("inf"))
    return Bound(span.generated_tokens / max(seconds.values()), seconds)


def _peak(machine: Machine) -> float:
    """The best FLOP/s that was measured of anything."""
    rates = machine.rates
    tables = [*rates.linear_flops_per_s.values(), *rates.expert_flops_per_s.values()]
    return max(rate for surface in tables for curve in surface.values() for rate in curve.values())

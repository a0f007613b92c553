"""A plan in words: what the model needs, what the machine has, what was chosen and why."""

from __future__ import annotations

from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.shape import DTYPE_BYTES, ModelShape
from moegen.units import format_bytes


def explain(shape: ModelShape, machine: Machine, plan: Plan) -> str:
    """Lines for people; `Plan.to_mapping` is the same for programs."""
    return "\n".join([*_model(shape, plan), *_machine(machine), *_plan(shape, plan)])


def _model(shape: ModelShape, plan: Plan) -> list[str]:
    moe = f"{shape.experts_per_token} of {shape.experts} experts per token" if shape.experts else "dense"
    lines = [
        f"model     {shape.model_type}: {shape.layers} layers, {moe}, {shape.weights / 1e6:,.1f} M parameters, "
        f"{shape.active_weights / 1e6:,.1f} M active, stored as {shape.dtype}",
        f"KV        {format_bytes(shape.kv_per_token * DTYPE_BYTES[plan.kv_dtype])} per token",
    ]
    if shape.latent_kv_per_token is not None:
        ratio = shape.kv_per_token / shape.latent_kv_per_token
        latent = format_bytes(shape.latent_kv_per_token * DTYPE_BYTES[plan.kv_dtype])
        lines.append(f"          kept as expanded heads: {ratio:.1f} times the latent's {latent} per token")
    return lines


def _machine(machine: Machine) -> list[str]:
    where = f"{machine.device_name}, {machine.cores} cores, {format_bytes(machine.host_memory_bytes)} of host memory"
    if machine.device != "cpu":
        where += f", {format_bytes(machine.device_memory_bytes)} of device memory"
    rates = machine.rates
    if not rates.gemm_flops_per_s:
        return [f"machine   {where} free; rates not measured (run: moegen probe)"]
    gemm = ", ".join(f"{dtype} {max(table.values()) / 1e9:,.0f}" for dtype, table in rates.gemm_flops_per_s.items())
    dram = rates.dram_read_bytes_per_s
    return [
        f"machine   {where} free",
        f"          GEMM peak GFLOP/s: {gemm}" + (f"; DRAM reads {dram / 1e9:.1f} GB/s" if dram else ""),
    ]


def _plan(shape: ModelShape, plan: Plan) -> list[str]:
    used = plan.weight_bytes + plan.kv_bytes + plan.activation_bytes
    sparsity = shape.experts_per_token / shape.experts if shape.experts else 1
    lines = [
        f"memory    {format_bytes(used)} of {format_bytes(plan.memory_bytes)}: weights "
        f"{format_bytes(plan.weight_bytes)} as {plan.compute_dtype}, KV {format_bytes(plan.kv_bytes)} as "
        f"{plan.kv_dtype}, activations {format_bytes(plan.activation_bytes)}",
        f"pass      {plan.pass_tokens} tokens ({plan.pass_tokens * sparsity:.0f} per expert), attention in "
        f"micro-batches of {plan.attention_tokens}, experts in chunks of {plan.expert_tokens} pairs",
        f"pages     {plan.kv_pages} of {plan.page_tokens} tokens: the longest prompt and answer "
        f"{plan.max_sequence_tokens} tokens",
    ]
    if plan.compute_dtype != plan.kv_dtype:
        lines.append(f"          computed in {plan.compute_dtype}: this CPU multiplies {plan.kv_dtype} more slowly")
    return lines

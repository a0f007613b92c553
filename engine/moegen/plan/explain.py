"""A plan in words: what the model needs, what the machine has, what was chosen and why."""

from __future__ import annotations

from dataclasses import fields, replace

from moegen.plan.curve import Surface
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine
from moegen.plan.outlook import Outlook
from moegen.plan.plan import MemoryUse, Plan
from moegen.shape import DTYPE_BYTES, ModelShape
from moegen.units import format_bytes, format_duration


def explain(shape: ModelShape, machine: Machine, outlook: Outlook) -> str:
    """Lines for people; `Outlook.to_mapping` is the same for programs."""
    plan = outlook.plan
    return "\n".join([*_model(shape, plan), *_machine(machine), *_plan(shape, plan), *_promise(machine, outlook)])


def _model(shape: ModelShape, plan: Plan) -> list[str]:
    moe = f"{shape.experts_per_token} of {shape.experts} experts per token" if shape.experts else "dense"
    lines = [
        f"model     {shape.model_type}: {shape.layers} layers, {moe}, {shape.weights / 1e6:,.1f} M parameters, "
        f"{shape.active_weights / 1e6:,.1f} M active, stored as {shape.dtype}",
    ]
    if shape.moe_layers:
        lines.append(_expert(shape, plan))
    if shape.state_per_sequence:
        state = Footprint(shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype).state
        lines.append(f"state     {format_bytes(state)} per running sequence, of recurrent layers")
    kept = Footprint(shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype, latent_kv=False)
    heads = format_bytes(kept.kv_token)
    if plan.kv_dtype == "int8":
        plain = format_bytes(replace(kept, kv_dtype=shape.dtype).kv_token)
        heads = f"{heads} of int8 codes and their scales, instead of {plain} of {shape.dtype},"
    if shape.latent_kv_per_token is None:
        return [*lines, f"KV        {heads} per token"]
    ratio = shape.kv_per_token / shape.latent_kv_per_token
    latent = format_bytes(shape.latent_kv_per_token * DTYPE_BYTES[shape.dtype])
    if plan.latent_kv:
        return [
            *lines,
            f"KV        {latent} per token, kept as latents: expanded heads would take {ratio:.1f} times that",
        ]
    return [*lines, f"KV        {heads} per token, kept as expanded heads: {ratio:.1f} times the latent's {latent}"]


def _expert(shape: ModelShape, plan: Plan) -> str:
    footprint = Footprint(shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype)
    stored = shape.stored_format or shape.dtype
    kept = shape.stored_format or (plan.expert_dtype if shape.kept_as == "as_stored" else shape.kept_as)
    expanded = footprint.expert_elements * DTYPE_BYTES[plan.compute_dtype]
    return (
        f"expert    {format_bytes(footprint.expert_stored)} as stored ({stored}), {format_bytes(footprint.expert)} in "
        f"memory ({kept}), {format_bytes(expanded)} expanded to {plan.compute_dtype}"
    )


def _machine(machine: Machine) -> list[str]:
    where = f"{machine.device_name}, {machine.cores} cores, {format_bytes(machine.host_memory_bytes)} of host memory"
    if machine.device != "cpu":
        where += f", {format_bytes(machine.device_memory_bytes)} of device memory"
    rates = machine.rates
    if not rates.measured:
        return [f"machine   {where} free; rates not measured, so nothing is predicted (run: moegen probe)"]
    peaks = {dtype: _peak(table) for dtype, table in rates.linear_flops_per_s.items()}
    lines = [
        f"machine   {where} free",
        "          GEMM peak GFLOP/s: " + ", ".join(f"{dtype} {peak / 1e9:,.0f}" for dtype, peak in peaks.items()),
    ]
    measured = {
        "DRAM reads": rates.dram_read_bytes_per_s,
        "disk": max(rates.disk_bytes_per_s.values(), default=None),
        "link to the device": rates.h2d_bytes_per_s,
    }
    known = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in measured.items() if rate)
    return [*lines, f"          {known}"] if known else lines


def _peak(surface: Surface) -> float:
    return max(max(curve.values()) for curve in surface.values())


def _plan(shape: ModelShape, plan: Plan) -> list[str]:
    sparsity = shape.experts_per_token / shape.experts if shape.experts else 1
    lines = [*_memory("host", plan.host), *_memory("device", plan.device_memory)]
    lines += [
        f"pass      {plan.pass_tokens} tokens ({plan.pass_tokens * sparsity:.0f} per expert), attention in "
        f"micro-batches of {plan.attention_tokens}, experts in chunks of {plan.expert_tokens} pairs; "
        f"{plan.level_tokens} or more at the end of the job",
        f"pages     {plan.kv_pages} of {plan.page_tokens} tokens on the {plan.kv_home}: the longest prompt and answer "
        f"{plan.max_sequence_tokens} tokens",
    ]
    if plan.kv_windows != (None,):
        lines.append(_windows(plan))
    if plan.state_slots:
        lines.append(f"slots     {plan.state_slots} sequences run at once, at most: each has a slot for its state")
    if plan.prefix_tokens:
        lines.append(
            f"prefix    {plan.prefix_tokens} tokens that nearly all prompts begin with are computed once and shared"
        )
    if plan.groups:
        lines.append(_experts(plan))
    if plan.rounded:
        lines.append("          products of bfloat16, added in float32; between products activations are float32")
    elif plan.kv_dtype not in (plan.compute_dtype, "int8"):
        lines.append(f"          computed in {plan.compute_dtype}: this CPU multiplies {plan.kv_dtype} more slowly")
    return lines


def _promise(machine: Machine, outlook: Outlook) -> list[str]:
    found, workload = outlook.prediction, outlook.workload
    if workload is None:
        return ["speed     not predicted: the rows are not known (give a job, or --rows, --prompt-tokens and "
                "--answer-tokens)"]  # fmt: skip
    if found is None:
        return ["speed     not predicted: this machine was not measured (run: moegen probe)"]
    lines = [
        f"rows      {workload.rows:,}: {workload.mean_prompt:,.0f} prompt tokens and {workload.mean_answer:,.0f} of "
        "answer in the mean, if every answer is as long as it may be",
        f"speed     {found.generated_tokens_per_s:,.1f} generated tokens/s over {format_duration(found.seconds)}, "
        f"{found.steady_tokens_per_s:,.1f} while rows are left, the tail {format_duration(found.tail_seconds)}",
        f"          {found.binding} binds: " + ", ".join(_shares(found.seconds_by_term, found.seconds)),
    ]
    more = {"host": outlook.host_gib_tokens_per_s, "device": outlook.device_gib_tokens_per_s}
    gains = ", ".join(f"{where} {gain:+,.1f}" for where, gain in more.items() if gain is not None)
    lines.append(f"          one more GiB of memory would change tokens/s by: {gains}")
    if outlook.few_bits_tokens_per_s:
        fewer = ", ".join(f"{name} {gain:+,.1f}" for name, gain in outlook.few_bits_tokens_per_s.items())
        lines.append(f"          fewer bits would change tokens/s by: {fewer}")
    return lines


def _shares(seconds_by_term: dict[str, float], seconds: float) -> list[str]:
    """The terms that matter, the largest first, in percent of the time."""
    terms = sorted(seconds_by_term.items(), key=lambda item: -item[1])
    return [f"{name} {share:.0%}" for name, term in terms if (share := term / seconds) >= 0.01]


def _memory(where: str, memory: MemoryUse) -> list[str]:
    if not memory.budget:
        return []
    parts = ", ".join(
        f"{item.name} {format_bytes(size)}"
        for item in fields(memory)
        if (size := getattr(memory, item.name)) and item.name != "budget"
    )
    return [f"{where:9} {format_bytes(memory.used)} of {format_bytes(memory.budget)}: {parts}"]


def _windows(plan: Plan) -> str:
    """Which tokens are given up where."""
    counts = {window: plan.kv_windows.count(window) for window in plan.kv_windows if window is not None}
    kept = ", ".join(f"{count} of them keep the last {window} tokens alone" for window, count in counts.items())
    return f"          each is of one of {len(plan.kv_windows)} groups of layers; {kept}"


def _experts(plan: Plan) -> str:
    kept = f"experts   {plan.groups} groups of {plan.group_experts} in each layer: {plan.resident_groups} resident"
    if not plan.streamed_groups:
        return f"{kept}, none moves"
    homes = f"{plan.host_groups} on the host, " if plan.host_groups else ""
    return (
        f"{kept}, {homes}{plan.disk_groups} on disk, through {plan.stream_slots} slots, "
        f"{plan.stream_depth} read ahead by {plan.reader_threads} threads"
    )

"""Rates of the engine's own operations, at the sizes that occur, over weights that do not fit a cache."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.initialization import no_init_weights

from moegen.memory.kv_pool import KVPool, KVShape
from moegen.model.dense import panel_weights
from moegen.model.host import ModelHost, is_experts
from moegen.model.seams import SEAMS
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.ops.expert_weights import ExpertGroup, ResidentExperts, expert_matrix
from moegen.ops.paged_kernel import attend_pages
from moegen.ops.sampling import sample
from moegen.plan.cost import CostModel
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine, Rates
from moegen.plan.plan import MemoryUse, Plan
from moegen.plan.predict import simulate
from moegen.plan.workload import Workload
from moegen.run.engine import Engine
from moegen.run.stats import PassReport
from moegen.run.timing import Timings, usual, usual_seconds
from moegen.schedule.sequence import Request, Sequence
from moegen.schedule.step import Chunk, QuerySpans, Step
from moegen.shape import ModelShape
from moegen.spec import Sampling

_EXPERT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_LINEAR_ROWS = (1, 4, 16, 64, 512)
_FLOPS = 10e9  # per timing; weights that many rows reuse need not be swept over
_LINEAR_SIDES = (256, 1024, 3072)
_CACHE_BYTES = 96 << 20  # weights are swept over more than this
_EXPERTS = ({"hidden_size": 1024, "moe_intermediate_size": 384, "num_experts": 64},
            {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 128},
            {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_experts": 8})  # fmt: skip
_PAGE_TOKENS, _HEAD_DIM, _KV_HEADS = 32, 128, 4
_LATENT, _LATENT_HEADS = KVShape(1, 512 + 64, 512, latent=True), 128
_VOCAB_SIZE = 16_384
_PASSES = (Workload(8, ((16, 10),)), Workload(128, ((16, 8),)), Workload(256, ((24, 5),)), Workload(4, ((512, 4),)))
_SAMPLED = Sampling(max_tokens=1 << 20)


@torch.inference_mode()
def linear_flops_per_s(device: torch.device, stored: torch.dtype, compute: torch.dtype, rounded: bool) -> Timings:
    """Of dense linear layers: `{elements of the weight: {rows: FLOP/s}}`."""

    def curve(side: int) -> Timings:
        linears = _linears(device, stored, compute, rounded, side)
        return {rows: partial(_linear_rate, linears, rows, device, compute) for rows in _LINEAR_ROWS}

    return {side * side: curve(side) for side in _LINEAR_SIDES}


def _linears(device: torch.device, stored: torch.dtype, compute: torch.dtype, rounded: bool, side: int) -> list[Any]:
    """Square layers, as the engine runs them: together larger than a cache."""
    count = max(_CACHE_BYTES // (side * side * stored.itemsize), 2)
    linear = nn.Linear(side, side, bias=False, device=device, dtype=compute).requires_grad_(False)
    linear.weight.fill_(2**-7)  # any dtype has it
    linears = [copy.deepcopy(linear) for _ in range(count)]
    if device.type == "cpu" and compute == torch.float32:
        panel_weights(nn.ModuleList(linears), stored, rounded)
    return linears


@torch.inference_mode()
def _linear_rate(linears: list[Any], rows: int, device: torch.device, compute: torch.dtype) -> float:
    side = linears[0].in_features
    x_TI = torch.ones(rows, side, device=device, dtype=compute)
    flops = 2 * rows * side * side
    swept = linears[: max(int(_FLOPS / flops), 2)]  # weights that many rows reuse need not leave the cache

    def sweep() -> None:
        for linear in swept:
            linear(x_TI)

    return flops * len(swept) / usual_seconds(sweep, device)


def expert_flops_per_s(
    device: torch.device, stored: torch.dtype, compute: torch.dtype, rounded: bool, sizes: int
) -> Timings:
    """Of the expert stage under random routing: `{elements of an expert: {mean rows per expert: FLOP/s}}`.

    `sizes` of experts are measured, the usual one first.
    """
    surface = {}
    for number, geometry in enumerate(_EXPERTS[:sizes]):
        host, _ = _model(device, stored, compute, rounded, num_hidden_layers=1, vocab_size=256, **geometry)
        (module,) = filter(is_experts, host.model.modules())
        elements = 3 * geometry["hidden_size"] * geometry["moe_intermediate_size"]
        surface[elements] = {
            rows: partial(_stage_rate, module, elements, rows, device, compute)
            for rows in _EXPERT_ROWS[:: 2 if number else 1]
        }
    return surface


@torch.inference_mode()
def _stage_rate(module: Any, elements: int, rows: int, device: torch.device, compute: torch.dtype) -> float:
    top_k = 4
    tokens = max(rows * module.num_experts // top_k, 1)
    hidden_TD = torch.randn(tokens, module.hidden_dim, device=device, dtype=compute)
    ids_TK = torch.rand(tokens, module.num_experts, device=device).topk(top_k).indices
    weights_TK = torch.full((tokens, top_k), 1 / top_k, device=device, dtype=compute)
    seconds = usual_seconds(lambda: module(hidden_TD, ids_TK, weights_TK), device)
    return 2 * tokens * top_k * elements / seconds


@torch.inference_mode()
def decode_bytes_per_s(dtype: torch.dtype, rounded: bool) -> dict[int, dict[int, float]]:
    """Decode attention on the host: `{query heads per KV head: {KV bytes of a sequence and KV head: bytes/s}}`."""
    device = torch.device("cpu")
    token_bytes = 2 * _HEAD_DIM * dtype.itemsize
    surface: dict[int, dict[int, float]] = {group: {} for group in (1, 4, 8)}
    for context in (64, 512, 4096):
        sequences = max(_CACHE_BYTES // (context * token_bytes * _KV_HEADS), 4)
        chunks = [(context - 1, 1)] * sequences
        for group, curve in surface.items():
            seconds = _attention_seconds(chunks, group, dtype, torch.float32, device, rounded)
            curve[context * token_bytes] = sequences * context * token_bytes * _KV_HEADS / seconds
    return surface


@torch.inference_mode()
def latent_flops_per_s(dtype: torch.dtype) -> float:
    """Decode attention over latents on the host, by as many heads of the size as a DeepSeek-V3 has."""
    context, sequences = 512, 8
    pages = KVPool({0: _LATENT}, sequences * context // _PAGE_TOKENS, _PAGE_TOKENS, dtype, torch.device("cpu")).layers[
        0
    ]
    ids = np.arange(sequences * context // _PAGE_TOKENS)
    starts = np.arange(sequences + 1) * (context // _PAGE_TOKENS)
    spans = QuerySpans(np.arange(sequences), np.ones(sequences, np.int64), np.full(sequences, context), starts, ids)
    query_SHW = torch.zeros(sequences, _LATENT_HEADS, _LATENT.key_dim)
    out_SHR = torch.empty(sequences, _LATENT_HEADS, _LATENT.value_dim)
    rule = AttentionRule(_HEAD_DIM**-0.5)
    seconds = usual_seconds(lambda: attend_pages(query_SHW, pages, spans, rule, out_SHR), torch.device("cpu"))
    return 2 * _LATENT_HEADS * (_LATENT.key_dim + _LATENT.value_dim) * sequences * context / seconds


@torch.inference_mode()
def device_decode_bytes_per_s(device: torch.device) -> float:
    """Decode attention over pages in the device's own memory, at a context of 512 tokens."""
    context, sequences = 512, 64
    seconds = _attention_seconds([(context - 1, 1)] * sequences, 4, torch.bfloat16, torch.bfloat16, device)
    return sequences * context * 2 * _HEAD_DIM * 2 * _KV_HEADS / seconds


@torch.inference_mode()
def prefill_flops_per_s(
    device: torch.device, stored: torch.dtype, compute: torch.dtype, rounded: bool
) -> dict[int, float]:
    """Attention of whole prompts: `{tokens of a prompt: FLOP/s}`, causal pairs counted once."""
    group, width = 4, 4 * _KV_HEADS * 2 * _HEAD_DIM
    rates = {}
    for length in (16, 64, 256, 1024):
        prompts = 2048 // length
        seconds = _attention_seconds([(0, length)] * prompts, group, stored, compute, device, rounded)
        rates[length] = 2 * width * prompts * length * (length + 1) / 2 / seconds
    return rates


def _attention_seconds(
    chunks: list[tuple[int, int]], group: int, stored: torch.dtype, compute: torch.dtype, device: torch.device,
    rounded: bool = False,
) -> float:  # fmt: skip
    """Of one layer's attention for chunks of (start, length), each of a sequence of its own."""
    pages = [-(-(start + length) // _PAGE_TOKENS) for start, length in chunks]
    ends = np.cumsum([0, *pages])
    step = Step(
        [
            Chunk(Sequence(Request(0, (0,), _SAMPLED), 0, [0] * (start + length), start,
                           [list(range(*ends[i : i + 2]))]), start, length)
            for i, (start, length) in enumerate(chunks)
        ],
        _PAGE_TOKENS,
    )  # fmt: skip
    pool = KVPool({0: KVShape(_KV_HEADS, _HEAD_DIM, _HEAD_DIM)}, int(ends[-1]), _PAGE_TOKENS, stored, device)
    (batch,) = step.attention_batches(step.tokens)
    key_TGD = torch.zeros(step.tokens, _KV_HEADS, _HEAD_DIM, dtype=compute, device=device)
    query_THD = torch.zeros(step.tokens, group * _KV_HEADS, _HEAD_DIM, dtype=compute, device=device)
    pool.layers[0].write(key_TGD, key_TGD, batch)
    rule = AttentionRule(_HEAD_DIM**-0.5)
    return usual_seconds(lambda: paged_attention(query_THD, pool.layers[0], batch, rule, rounded=rounded), device)


@torch.inference_mode()
def logit_seconds(device: torch.device) -> float:
    """Sampling, greedy, for every logit."""
    sequences = [Sequence(Request(0, (0,), _SAMPLED), 0, [0]) for _ in range(256)]
    logits_SV = torch.randn(len(sequences), _VOCAB_SIZE, device=device)
    return usual_seconds(lambda: sample(logits_SV, sequences), device) / logits_SV.numel()


def fixed_seconds(machine: Machine, stored: torch.dtype, compute: torch.dtype) -> dict[str, Any]:
    """Of a pass, of each layer and of each further group of its experts, whatever is in them: one sequence decoding in
    models of almost no arithmetic."""
    sizes = {layers: partial(_decode_pass_seconds, machine, stored, compute, layers) for layers in (2, 10)}
    few, many = usual(sizes).values()
    layer = max((many - few) / 8, 0.0)
    group = _group_seconds(machine, stored, compute)
    return {"layer_s": layer, "pass_s": max(few - 2 * layer, 0.0), "group_s": group}


@torch.inference_mode()
def _group_seconds(machine: Machine, stored: torch.dtype, compute: torch.dtype) -> float:
    """By a stage whose experts come one at a time, beside the same stage in one group."""
    device, experts, side = torch.device(machine.device), 16, 64
    host, _ = _model(device, stored, compute, machine.dots_bf16, num_hidden_layers=1, vocab_size=256, hidden_size=side,
                     moe_intermediate_size=32, num_experts=experts)  # fmt: skip
    (module,) = filter(is_experts, host.model.modules())
    x_TD = torch.ones(experts, side, device=device, dtype=compute)
    ids_TK = torch.arange(experts, device=device)[:, None]
    weights_TK = torch.ones(experts, 1, device=device, dtype=compute)
    together = usual_seconds(lambda: module(x_TD, ids_TK, weights_TK), device)
    groups = tuple(
        ExpertGroup(
            expert,
            expert_matrix(1, 64, side, stored, compute, device, machine.dots_bf16),
            expert_matrix(1, side, 32, stored, compute, device, machine.dots_bf16),
        )
        for expert in range(experts)
    )
    module.moegen = replace(module.moegen, supply=ResidentExperts(groups))
    apart = usual_seconds(lambda: module(x_TD, ids_TK, weights_TK), device)
    return max((apart - together) / (experts - 1), 0.0)


def _decode_pass_seconds(machine: Machine, stored: torch.dtype, compute: torch.dtype, layers: int) -> float:
    host, _ = _model(torch.device(machine.device), stored, compute, machine.dots_bf16,
                     num_hidden_layers=layers, hidden_size=64, num_experts=4, num_experts_per_tok=1,
                     moe_intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                     vocab_size=256)  # fmt: skip
    reports = _run(host, _plan(machine, stored, compute), Workload(1, ((4, 20),)))
    return float(np.quantile([report.seconds for report in reports[4:]], 0.25))


class SmallPasses:
    """Passes of a small model, few and many tokens in each: what they take, and how much of it no rate explains."""

    def __init__(self, machine: Machine, stored: torch.dtype, compute: torch.dtype) -> None:
        self._host, self._shape = _model(torch.device(machine.device), stored, compute, machine.dots_bf16,
                                         num_hidden_layers=2, vocab_size=_VOCAB_SIZE, **_EXPERTS[0])  # fmt: skip
        self._plan = _plan(machine, stored, compute)
        for workload in _PASSES:
            self._seconds(workload)  # what memory they need is new to them, once

    @property
    def timings(self) -> Timings:
        """Seconds of each pass, by the workload that makes them."""
        return {workload: partial(self._seconds, workload) for workload in _PASSES}

    def _seconds(self, workload: Workload) -> list[float]:
        return [report.seconds for report in _run(self._host, self._plan, workload)]

    def rest(self, measured: Timings, rates: Rates) -> dict[str, Any]:
        """Of every layer, of every sequence in a pass and of every hidden element of a token in a layer: what passes
        took beyond what `rates` explain."""
        plan, shape = self._plan, self._shape
        footprint = Footprint(shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype)
        model = CostModel(footprint, plan, replace(rates, element_s=0.0, sequence_s=0.0))
        rest, causes = [], []
        for workload, found in measured.items():
            seconds, load = np.array(found), simulate(plan, workload).load
            rest.append((seconds - model.time(load).seconds) / seconds)
            layers = np.full_like(seconds, shape.layers)
            causes.append(np.stack([layers, load.sequences, load.tokens * shape.layers * shape.hidden_size]) / seconds)
        layer, sequence, element = _not_negative(np.concatenate(causes, axis=1).T, np.concatenate(rest))
        return {"layer_s": (rates.layer_s or 0) + layer, "sequence_s": sequence, "element_s": element}


def _not_negative(causes: np.ndarray, rest: np.ndarray) -> list[float]:
    """Least squares of some causes, `[passes, causes]`, none of which may be below 0: the best of all subsets."""
    count = causes.shape[1]
    best, least = np.zeros(count), float(np.sum(rest**2))
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            found = np.zeros(count)
            found[list(subset)] = np.linalg.lstsq(causes[:, subset], rest, rcond=None)[0]
            error = float(np.sum((rest - causes @ found) ** 2))
            if (found >= 0).all() and error < least:
                best, least = found, error
    return best.tolist()


def _run(host: ModelHost, plan: Plan, workload: Workload) -> list[PassReport]:
    requests = [
        Request(row, tuple(np.random.default_rng(row).integers(1, 250, prompt).tolist()), Sampling(max_tokens=answer))
        for row, (prompt, answer) in enumerate(workload.lengths * workload.rows)
    ]
    with Engine(host, plan, None) as engine:
        return [item for item in engine.generate(requests) if isinstance(item, PassReport)]


def _plan(machine: Machine, stored: torch.dtype, compute: torch.dtype) -> Plan:
    on_cpu = machine.device == "cpu"
    return Plan(
        device=machine.device, threads=machine.cores, compute_dtype=_name(compute), expert_dtype=_name(stored),
        kv_dtype=_name(stored), attention_tokens=2048, expert_tokens=8192, pass_tokens=4096, level_tokens=4096,
        logit_tokens=4096, page_tokens=_PAGE_TOKENS, kv_pages=2048, kv_home="host" if on_cpu else "device",
        attention_on_host=float(on_cpu), groups=1, group_experts=1 << 20, resident_groups=1, host_groups=0,
        stream_slots=0, stream_depth=0, reader_threads=0, host=MemoryUse(), device_memory=MemoryUse(),
        rounded=machine.dots_bf16,
    )  # fmt: skip


def _model(
    device: torch.device, stored: torch.dtype, compute: torch.dtype, rounded: bool, **config: Any
) -> tuple[ModelHost, ModelShape]:
    """Of random weights, kept in `stored` where the engine does so."""
    usual = {"num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
             "norm_topk_prob": True, "max_position_embeddings": 8192, "tie_word_embeddings": False,
             "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    settings = Qwen3MoeConfig(**{**usual, "intermediate_size": config["moe_intermediate_size"], **config})
    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(settings, dtype=compute, **SEAMS)
    for name, parameter in model.named_parameters():  # only routing needs weights that differ
        random = "experts" not in name and parameter.dim() > 1
        parameter.data.normal_(0, 0.02) if random else parameter.data.fill_(0.01)
        parameter.data.copy_(parameter.data.to(stored))  # as a checkpoint of that dtype has them
    settings.dtype = stored
    shape = ModelShape.of(settings, {name: tuple(p.shape) for name, p in model.named_parameters()})
    return ModelHost(model, staged=True, expert_tokens=8192, stored_dtype=stored, rounded=rounded), shape


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Chooses a plan for a model on a machine. A first honest version: everything resident, sizes from what they must fit.

Passes are as large as keeps experts busy (`_BUSY_ROWS` rows each) within a tenth of the memory; what remains beside the
weights is KV pages, since more sequences in flight mean more rows per expert in every decode pass.
"""

from __future__ import annotations

from moegen.errors import BudgetError
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.shape import DTYPE_BYTES, ModelShape
from moegen.spec import Engine
from moegen.units import format_bytes, parse_bytes

_SHARE_OF_FREE = 0.8  # of what is free, unless the job names a budget
_BUSY_ROWS = 512  # rows per expert from which a GEMM runs near its peak rate
_ONE_THREAD_FLOPS = 1e8  # about a millisecond of one core
_MIN_PASS_TOKENS, _MAX_PASS_TOKENS = 2048, 16_384
_ATTENTION_TOKENS, _EXPERT_TOKENS, _PAGE_TOKENS = 2048, 8192, 32
_RUNTIME_BYTES = 512 << 20  # interpreter, libraries, tokenizer, tables
_MIN_SEQUENCE_TOKENS = 256  # a pool that cannot hold even this is refused


def choose_plan(shape: ModelShape, machine: Machine, engine: Engine, dtype: str = "auto") -> Plan:
    """The plan for this model, machine and budget, with `engine.plan`'s own choices on top.

    Raises:
        BudgetError: weights and the smallest pool do not fit; says the smallest budget that would do.
    """
    memory = _budget(machine, engine)
    fixed = engine.plan
    model_dtype = shape.dtype if dtype == "auto" else dtype
    compute_dtype = _compute_dtype(shape, machine, model_dtype, memory)
    weight_bytes = shape.weights * DTYPE_BYTES[compute_dtype]
    pass_tokens = fixed.pass_tokens or _pass_tokens(shape, memory)
    attention_tokens = fixed.attention_tokens or min(_ATTENTION_TOKENS, pass_tokens)
    expert_tokens = fixed.expert_tokens or _EXPERT_TOKENS
    activation_bytes = _activation_bytes(shape, pass_tokens, expert_tokens)
    page_tokens = fixed.page_tokens or _PAGE_TOKENS
    page_bytes = shape.kv_per_token * DTYPE_BYTES[model_dtype] * page_tokens
    room = memory - _RUNTIME_BYTES - weight_bytes - activation_bytes
    useful = -(-pass_tokens * min(shape.max_position_embeddings, 1 << 20) // page_tokens)
    kv_pages = fixed.kv_pages or min(room // page_bytes, useful)
    needed = (fixed.kv_pages or -(-_MIN_SEQUENCE_TOKENS // page_tokens)) * page_bytes
    if room < needed:
        raise _too_small(machine, memory, weight_bytes, activation_bytes, needed)
    return Plan(
        device=machine.device,
        threads=_threads(shape, machine),
        compute_dtype=compute_dtype,
        kv_dtype=model_dtype,
        attention_tokens=attention_tokens,
        expert_tokens=expert_tokens,
        pass_tokens=pass_tokens,
        page_tokens=page_tokens,
        kv_pages=kv_pages,
        weight_bytes=weight_bytes,
        kv_bytes=kv_pages * page_bytes,
        activation_bytes=activation_bytes,
        memory_bytes=memory,
    )


def _budget(machine: Machine, engine: Engine) -> int:
    if machine.device != "cpu":
        return int(machine.device_memory_bytes * _SHARE_OF_FREE)
    if engine.host_memory is not None:
        return parse_bytes(engine.host_memory, "engine.host_memory")
    return int(machine.host_memory_bytes * _SHARE_OF_FREE)


def _compute_dtype(shape: ModelShape, machine: Machine, model_dtype: str, memory: int) -> str:
    """The model's dtype, but float32 on a CPU that has no instructions for it, where that fits twice as slow memory."""
    if machine.device != "cpu" or model_dtype == "float32":
        return model_dtype
    if _multiplies_faster_in_float32(machine, model_dtype) and shape.weights * 4 <= memory // 2:
        return "float32"
    return model_dtype


def _multiplies_faster_in_float32(machine: Machine, dtype: str) -> bool:
    measured = machine.rates.gemm_flops_per_s
    rows = 64
    if rows in measured.get("float32", {}) and rows in measured.get(dtype, {}):
        return measured["float32"][rows] > measured[dtype][rows]
    return dtype == "float16" or not machine.native_bf16


def _threads(shape: ModelShape, machine: Machine) -> int:
    """All cores, or one where a whole GEMM is over before a second thread has woken up."""
    gemm_flops = 2 * _BUSY_ROWS * shape.hidden_size**2
    return machine.cores if gemm_flops > _ONE_THREAD_FLOPS else 1


def _pass_tokens(shape: ModelShape, memory: int) -> int:
    sparsity = shape.experts / shape.experts_per_token if shape.experts_per_token else 1
    tokens = min(max(int(_BUSY_ROWS * sparsity), _MIN_PASS_TOKENS), _MAX_PASS_TOKENS)
    while tokens > 256 and _activation_bytes(shape, tokens, _EXPERT_TOKENS) > memory // 10:
        tokens //= 2
    return tokens


def _activation_bytes(shape: ModelShape, pass_tokens: int, expert_tokens: int) -> int:
    """Float32 throughout: the pass's hidden states and their neighbours, one expert chunk, logits of a pass."""
    per_token = 8 * shape.hidden_size + 4 * shape.experts
    per_pair = 6 * shape.hidden_size
    logits = min(pass_tokens, 4096) * shape.vocab_size
    return 4 * (pass_tokens * per_token + expert_tokens * per_pair + logits)


def _too_small(machine: Machine, memory: int, weights: int, activations: int, pages: int) -> BudgetError:
    where = "host memory" if machine.device == "cpu" else "device memory"
    smallest = _RUNTIME_BYTES + weights + activations + pages
    return BudgetError(
        f"{where}: {format_bytes(memory)} cannot hold {format_bytes(weights)} of weights, "
        f"{format_bytes(activations)} of activations, {format_bytes(_RUNTIME_BYTES)} for the runtime and "
        f"{format_bytes(pages)} of KV pages; the smallest budget that would do is {format_bytes(smallest)}"
    )

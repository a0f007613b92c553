"""Chooses a plan for a model on a machine: of all plans that keep within the budgets, the one predicted to be fastest.

What is chosen between: more KV pages let more sequences meet each expert; more resident groups leave less to stream;
larger passes give experts more rows but take activations; more slots hide more of the stream. Memory is spent to the
budget, and never beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moegen.errors import BudgetError, SpecError
from moegen.plan.cost import CostModel, balanced_attention
from moegen.plan.curve import Surface
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine, Rates
from moegen.plan.nominal import nominal_rates
from moegen.plan.plan import MemoryUse, Plan
from moegen.plan.predict import FULL, Fidelity, predict
from moegen.plan.workload import UNKNOWN, Workload
from moegen.shape import DTYPE_BYTES, ModelShape
from moegen.spec import Engine
from moegen.units import format_bytes, parse_bytes

_SHARE_OF_FREE = 0.8  # of what is free, unless the job names a budget
_ONE_THREAD_FLOPS = 1e8  # about a millisecond of one core
_BUSY_ROWS = 512  # rows per expert from which a GEMM runs near its peak rate
_MIN_PASS_TOKENS = 2048
_MOVING_TRUST = 0.9
_PASS_TOKENS = (256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384)
_LEVEL_TOKENS = (32, 64, 128, 192, *_PASS_TOKENS)
_SHORT_LEVEL_TOKENS = (32, 128, 512, 2048)  # that are tried on a short job
_EFFICIENT = 0.95  # of the speed of the largest pass
_AS_FAST = 1.02  # beside the fastest
_ATTENTION_TOKENS, _EXPERT_TOKENS = 2048, 8192
_PAGE_TOKENS, _DEVICE_PAGE_TOKENS = 16, 32  # gathers want longer runs; a CPU reads pages in place
_CHUNK_BYTES, _MIN_EXPERT_TOKENS = 24 << 20, 512
_SLOTS = (2, 3, 4, 6, 8)
_DEVICE_SLOTS = (2, 4)  # a copy over the link waits for no seek
_READER_THREADS, _STAGING_BYTES = 3, 8 << 20  # each reader reads into a buffer of its own
_RUNTIME_BYTES = 560 << 20  # resident after a tiny model has run, where no probe measured it
_DEVICE_RUNTIME_BYTES = 768 << 20  # the device's context and its libraries' workspaces
_MIN_SEQUENCE_TOKENS = 256  # a pool that cannot hold even this is refused
_SIMULATED_PLANS = 8  # that are tried on the rows of a short job
_NEARLY = 0.8  # of the best: worth is no more exact than that
_SIMULATED_TOKENS = 20_000  # that a short job generates at most
_ROUGH_STEPS, _ROUGH_ROWS = 6000, 4  # of a simulation of a job that is not: about so many, rows at least
_FREE_PAGES = 1 << 20  # where no layer attends, pages take no bytes: they count tokens
_KV_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the host's room, where host groups want it too


def choose_plan(
    shape: ModelShape,
    machine: Machine,
    engine: Engine,
    dtype: str = "auto",
    workload: Workload = UNKNOWN,
    *,
    streamable: bool = True,
) -> Plan:
    """The plan for this model, machine and budget, with `engine.plan`'s own choices on top.

    `streamable` is false where the checkpoint's experts cannot be read piece by piece: they are all resident then.

    Raises:
        BudgetError: no plan keeps within the budget; says the smallest budget that would do.
        SpecError: pages cannot be of the dtype that the job wants.
    """
    search = _Search.of(shape, machine, engine, dtype, workload, streamable)
    fitting = [plan for plan in search.plans() if plan.host.spare >= 0 and plan.device_memory.spare >= 0]
    if not fitting:
        raise search.refusal()
    return search.best(fitting)


@dataclass(frozen=True)
class _Search:
    """What every candidate has in common."""

    footprint: Footprint
    machine: Machine
    engine: Engine
    workload: Workload
    streamable: bool
    host_budget: int
    device_budget: int
    rounded: bool

    @classmethod
    def of(
        cls, shape: ModelShape, machine: Machine, engine: Engine, dtype: str, workload: Workload, streamable: bool
    ) -> _Search:
        host = _budget(engine.host_memory, machine.host_memory_bytes, "engine.host_memory")
        device = _budget(engine.device_memory, machine.device_memory_bytes, "engine.device_memory")
        model_dtype = shape.dtype if dtype == "auto" else dtype
        compute_dtype = _compute_dtype(shape, machine, model_dtype, host)
        footprint = Footprint(
            shape,
            compute_dtype=compute_dtype,
            expert_dtype=_expert_dtype(shape, machine, model_dtype, compute_dtype),
            kv_dtype=model_dtype if engine.plan.kv_dtype == "auto" else engine.plan.kv_dtype,
            fixed_group_experts=engine.plan.group_experts,
            latent_kv=engine.plan.latent_kv,
            free_windows=engine.plan.free_windows,
        )
        if footprint.latent and footprint.kv_dtype == "int8":
            raise SpecError(
                "engine.plan.kv_dtype: 'int8' cannot be used for latents, which are few bytes as they are; leave it "
                "out, or keep the keys and values of all heads by engine.plan.latent_kv: false"
            )
        # A model of bfloat16 is one of rounded activations: the job is asked for no more than that.
        kept = {footprint.expert_dtype, model_dtype}
        rounded = machine.dots_bf16 and compute_dtype == "float32" and kept == {"bfloat16"}
        return cls(footprint, machine, engine, workload, streamable, host, device, rounded)

    @property
    def rates(self) -> Rates:
        return self.machine.rates if self.machine.rates.measured else nominal_rates(self.machine)

    def worth(self, plan: Plan) -> tuple[float, int, int]:
        """Jobs of this kind per second; of equally fast plans, the one that reads and takes less."""
        load, passes = self.workload.phases(plan)
        seconds = CostModel(self.footprint, plan, self.rates).time(load).seconds
        return self._trust(plan) / float(seconds @ passes), -plan.disk_groups, -plan.host.used

    def best(self, plans: list[Plan]) -> Plan:
        """Of those that come first by worth, the one that is fastest in a simulation; of a short job, with its passes
        levelled as its own simulation says."""
        fixed = self.engine.plan.level_tokens

        def level_tokens(plan: Plan) -> int:
            """Of a short job as low as may be: else what pass sizes make of its end would not show."""
            return fixed or (min(_SHORT_LEVEL_TOKENS) if self._is_short else self.level_tokens(plan))

        levelled = [
            replace(plan, level_tokens=level_tokens(plan), ready_pages=self.workload.steady_pages(plan))
            for plan in self._first(plans)
        ]
        fastest = min(levelled, key=self._simulated_seconds) if len(levelled) > 1 else levelled[0]
        return self._best_level(fastest) if self._is_short and not fixed else fastest

    def _first(self, plans: list[Plan]) -> list[Plan]:
        """By worth: several of a short job; else the best of each pass size, with weights that move and without, of
        those that are worth nearly as much. Where nothing is known of the rows there is nothing to simulate: the first.

        Rows that entered together end together, and large passes then alternate with small ones: a mean pass, which
        worth goes by, does not show that.
        """
        first = sorted(plans, key=self.worth, reverse=True)
        if self._is_short or self.workload is UNKNOWN:
            return first[: _SIMULATED_PLANS if self._is_short else 1]
        best_of_size = {(plan.pass_tokens, plan.streamed_groups > 0): plan for plan in reversed(first)}
        least = _NEARLY * self.worth(first[0])[0]
        return [plan for plan in best_of_size.values() if self.worth(plan)[0] >= least]

    def _best_level(self, plan: Plan) -> Plan:
        """With the smallest `level_tokens` of those that make the whole job about as fast as any: its last passes are
        as full as those before, so that it ends when its rate says."""
        sizes = [size for size in _SHORT_LEVEL_TOKENS if size < plan.pass_tokens] + [plan.pass_tokens]
        plans = [replace(plan, level_tokens=size) for size in sizes]
        seconds = [self._simulated_seconds(plan) for plan in plans]
        return next(plan for plan, took in zip(plans, seconds, strict=True) if took <= _AS_FAST * min(seconds))

    def _simulated_seconds(self, plan: Plan) -> float:
        """As far as may be trusted."""
        return predict(self.footprint, plan, self.rates, self.workload, self._fidelity).seconds / self._trust(plan)

    @property
    def _fidelity(self) -> Fidelity:
        """Rough where the job is not short: several plans are compared."""
        if self._is_short:
            return FULL
        sequences = int(min(max(_ROUGH_STEPS / (_ROUGH_ROWS * self.workload.mean_answer), 4), 32))
        return Fidelity(sequences, _ROUGH_ROWS, steps=0)

    @property
    def _is_short(self) -> bool:
        """So that its beginning and its end are most of it."""
        return self.workload.rows * self.workload.mean_answer <= _SIMULATED_TOKENS

    def _trust(self, plan: Plan) -> float:
        """Disks and links are shared: weights that could stay move only for a clear gain."""
        return _MOVING_TRUST if plan.streamed_groups else 1.0

    def level_tokens(self, plan: Plan) -> int:
        """The smallest pass whose tokens cost hardly more time each than those of the largest."""
        steady = self.workload.steady_pass(plan)
        sizes = np.array([size for size in _LEVEL_TOKENS if size < plan.pass_tokens] + [plan.pass_tokens])
        loads = steady.scaled(sizes / steady.tokens)
        seconds_per_token = CostModel(self.footprint, plan, self.rates).time(loads).seconds / sizes
        return int(sizes[seconds_per_token <= seconds_per_token[-1] / _EFFICIENT][0])

    def plans(self) -> Iterator[Plan]:
        """Every candidate, whether it fits or not."""
        for resident in self._residents():
            moves = resident < self.footprint.groups
            for pass_tokens in _fixed_or(self.engine.plan.pass_tokens, self._pass_sizes(moves)):
                for slots in _fixed_or(self.engine.plan.stream_slots, self._slots) if moves else (0,):
                    frame = self._frame(pass_tokens, resident, slots)
                    yield from [self._with_pages(frame)] if self.machine.device == "cpu" else self._on_device(frame)

    def _pass_sizes(self, moves: bool) -> tuple[int, ...]:
        """Where nothing moves, experts gain nothing from passes that give them more than `_BUSY_ROWS` rows."""
        shape = self.footprint.shape
        busy = _BUSY_ROWS * shape.experts // shape.experts_per_token if shape.experts_per_token else _BUSY_ROWS
        return tuple(size for size in _PASS_TOKENS if moves or size <= max(busy, _MIN_PASS_TOKENS))

    @property
    def _expert_tokens(self) -> int:
        """On a CPU, so few that no activation of a chunk is larger than what the C library keeps."""
        if self.machine.device != "cpu" or not self.footprint.shape.experts:
            return _EXPERT_TOKENS
        widest = max(self.footprint.shape.hidden_size, 2 * self.footprint.expert_width)  # gate and up side by side
        return min(max(_CHUNK_BYTES // (4 * widest), _MIN_EXPERT_TOKENS), _EXPERT_TOKENS)

    @property
    def _slots(self) -> tuple[int, ...]:
        return _SLOTS if self.machine.device == "cpu" else _DEVICE_SLOTS

    def _residents(self) -> tuple[int, ...]:
        groups = self.footprint.groups
        if not self.streamable:
            return (groups,)
        fixed = self.engine.plan.resident_groups
        return tuple(range(groups + 1)) if fixed is None else (min(fixed, groups),)

    def _frame(self, pass_tokens: int, resident: int, slots: int) -> Plan:
        """A candidate without KV pages and, on a GPU, without groups in the host's slab."""
        fixed, footprint = self.engine.plan, self.footprint
        attention_tokens = fixed.attention_tokens or min(_ATTENTION_TOKENS, pass_tokens)
        expert_tokens = fixed.expert_tokens or min(
            self._expert_tokens, pass_tokens * max(footprint.shape.experts_per_token, 1)
        )
        readers = (fixed.reader_threads or _READER_THREADS) if slots else 0
        depth = max(slots - 1, 0) if fixed.stream_depth is None else min(fixed.stream_depth, max(slots - 1, 0))
        weights = MemoryUse(
            dense=footprint.dense,
            experts=footprint.groups_of_every_layer(resident),
            slots=slots * footprint.group,
            activations=max(  # loading is over before the first pass
                footprint.activations(pass_tokens, attention_tokens, expert_tokens),
                footprint.dense_loading - footprint.dense,
            ),
        )
        measured = self.machine.rates.runtime_bytes or _RUNTIME_BYTES
        host = MemoryUse(
            staging=readers * _STAGING_BYTES, runtime=measured + footprint.tokenizer, budget=self.host_budget
        )
        device = MemoryUse(budget=self.device_budget)
        if self.machine.device == "cpu":
            host = replace(weights, staging=host.staging, runtime=host.runtime, budget=host.budget)
        else:
            device = replace(weights, runtime=_DEVICE_RUNTIME_BYTES, budget=device.budget)
        return Plan(
            device=self.machine.device,
            threads=_threads(footprint.shape, self.machine),
            compute_dtype=footprint.compute_dtype,
            expert_dtype=footprint.expert_dtype,
            kv_dtype=footprint.kv_dtype,
            attention_tokens=attention_tokens,
            expert_tokens=expert_tokens,
            pass_tokens=pass_tokens,
            level_tokens=pass_tokens,
            logit_tokens=min(pass_tokens, footprint.logit_tokens),
            page_tokens=self._page_tokens,
            kv_pages=0,
            kv_home="host",
            attention_on_host=1.0,
            **self._grouping(resident),
            host_groups=0,
            stream_slots=slots,
            stream_depth=depth,
            reader_threads=readers,
            host=host,
            device_memory=device,
            prefix_tokens=self._prefix_tokens,
            latent_kv=footprint.latent_kv,
            kv_windows=tuple(group.window for group in footprint.layer_groups),
            rounded=self.rounded,
            weights=footprint.shape.kept_as,
        )

    @property
    def _page_tokens(self) -> int:
        on_cpu = self.machine.device == "cpu"
        return self.engine.plan.page_tokens or (_PAGE_TOKENS if on_cpu else _DEVICE_PAGE_TOKENS)

    @property
    def _prefix_tokens(self) -> int:
        """In whole pages, as they are shared."""
        stateless = not self.footprint.shape.state_per_sequence  # a state at the prefix's end is not kept
        shared = self.workload.prefix_tokens if self.engine.plan.share_prefix and stateless else 0
        return shared // self._page_tokens * self._page_tokens

    def _grouping(self, resident: int) -> dict[str, Any]:
        """Where nothing moves, a layer is one group: nothing is gained by cutting it."""
        experts, fixed = self.footprint.shape.experts, self.engine.plan.group_experts
        if resident == self.footprint.groups and experts and not fixed:
            return {"groups": 1, "group_experts": experts, "resident_groups": 1}
        groups, size = self.footprint.groups, self.footprint.group_experts
        return {"groups": groups, "group_experts": size, "resident_groups": resident}

    def _on_device(self, frame: Plan) -> Iterator[Plan]:
        """On a GPU: pages beside the resident weights, or on the host beside the slab that other weights come from."""
        moving = frame.streamed_groups
        if min(frame.host.spare, frame.device_memory.spare) < 0:
            yield self._with_pages(frame)  # does not fit, whatever else is chosen
            return
        if self.engine.plan.kv_home == "device":
            yield self._with_pages(self._with_slab(replace(frame, kv_home="device", attention_on_host=0.0), moving))
            return
        for share in _KV_SHARES:
            slab = int(max(frame.host.spare, 0) * (1 - share))
            groups = min(slab // max(self.footprint.groups_of_every_layer(1), 1), moving)
            paged = self._with_pages(self._with_slab(frame, groups))
            if paged.host.spare >= 0:
                load = self.workload.steady_pass(paged)
                yield replace(paged, attention_on_host=balanced_attention(self.footprint, paged, self.rates, load))

    def _with_slab(self, plan: Plan, groups: int) -> Plan:
        """With the next `groups` groups of every layer on the host, or as many as it has room for."""
        first = self.footprint.groups_of_every_layer(plan.resident_groups)
        while groups and self.footprint.groups_of_every_layer(plan.resident_groups + groups) - first > plan.host.spare:
            groups -= 1
        slab = self.footprint.groups_of_every_layer(plan.resident_groups + groups) - first
        return replace(plan, host_groups=groups, host=replace(plan.host, experts=slab))

    def _with_pages(self, plan: Plan) -> Plan:
        """With all pages that there is room for and use for; at least as many as the smallest pool has.

        And with the state slots of as many sequences as have room for their pages beside them.
        """
        memory = plan.host if plan.kv_home == "host" else plan.device_memory
        page, slots = self.footprint.page(plan.page_tokens), self._state_slots(plan, memory)
        memory = replace(memory, state=slots * self.footprint.state)
        useful = (slots or plan.pass_tokens) * plan.ledger().most_pages(self._longest)
        there = min(memory.spare // page if page else _FREE_PAGES, useful)
        pages = self.engine.plan.kv_pages or max(there, self._fewest_pages(plan))
        filled = replace(memory, kv=pages * page)
        if plan.kv_home == "host":
            return replace(plan, kv_pages=pages, state_slots=slots, host=filled)
        return replace(plan, kv_pages=pages, state_slots=slots, device_memory=filled)

    def _state_slots(self, plan: Plan, memory: MemoryUse) -> int:
        """None at all where no layer carries a state; a sequence takes as many pages as one has in the mean."""
        if not (state := self.footprint.state):
            return 0
        context = min(self.workload.mean_context, self._longest) + 1.5 * plan.page_tokens
        each = state + int(context / plan.page_tokens * self.footprint.page(plan.page_tokens))
        wanted = self.engine.plan.state_slots or memory.spare // each
        return int(min(max(wanted, 1), plan.pass_tokens))

    def _fewest_pages(self, plan: Plan) -> int:
        return plan.ledger().most_pages(min(self._longest, _MIN_SEQUENCE_TOKENS))

    @property
    def _longest(self) -> int:
        return min(self.footprint.shape.max_position_embeddings, 1 << 20)

    def refusal(self) -> BudgetError:
        """The candidate that exceeds its budgets least, in figures."""
        least = max(self.plans(), key=lambda plan: min(plan.host.spare, 0) + min(plan.device_memory.spare, 0))
        on_device = least.device_memory.spare < 0
        memory, where = (least.device_memory, "device") if on_device else (least.host, "host")
        parts = {
            "dense weights": memory.dense, "resident experts": memory.experts, "slots of moving experts": memory.slots,
            "reading": memory.staging, "KV pages": memory.kv, "state slots": memory.state,
            "activations": memory.activations, "the runtime": memory.runtime,
        }  # fmt: skip
        needs = ", ".join(f"{format_bytes(size)} for {name}" for name, size in parts.items() if size)
        return BudgetError(
            f"engine.{where}_memory: {format_bytes(memory.budget)} cannot hold {needs}; "
            f"the smallest budget that would do is {format_bytes(memory.used)}"
        )


def _fixed_or(fixed: int | None, choices: tuple[int, ...]) -> tuple[int, ...]:
    return choices if fixed is None else (fixed,)


def _budget(named: str | None, free: int, field: str) -> int:
    """What the job names, but never more than there is; without a name, most of what is free."""
    return int(free * _SHARE_OF_FREE) if named is None else min(parse_bytes(named, field), free)


def _compute_dtype(shape: ModelShape, machine: Machine, model_dtype: str, memory: int) -> str:
    """The model's dtype, but float32 on a CPU that has no instructions for it, or whose instructions our kernel has use
    for (see `Plan.rounded`), where the dense weights fit so."""
    if machine.device != "cpu" or model_dtype == "float32":
        return model_dtype
    if shape.in_few_bits:
        return "float32"  # to which the CPU's kernel expands codes
    dense = (shape.weights - shape.expert_weights) * 4
    return "float32" if _adds_in_float32(machine, model_dtype) and dense <= memory // 3 else model_dtype


def _adds_in_float32(machine: Machine, dtype: str) -> bool:
    if machine.dots_bf16:
        return True
    measured = machine.rates.linear_flops_per_s
    if "float32" in measured and dtype in measured:
        return _peak(measured["float32"]) > _peak(measured[dtype])
    return dtype == "float16" or not machine.native_bf16


def _peak(surface: Surface) -> float:
    return max(max(curve.values()) for curve in surface.values())


def _expert_dtype(shape: ModelShape, machine: Machine, model_dtype: str, compute_dtype: str) -> str:
    """As stored where a CPU kernel widens weights to float32 as it reads them; otherwise as they are multiplied."""
    if machine.device != "cpu" or compute_dtype != "float32":
        return compute_dtype
    return min(shape.dtype, model_dtype, key=lambda dtype: DTYPE_BYTES[dtype])


def _threads(shape: ModelShape, machine: Machine) -> int:
    """All cores, or one where a whole GEMM is over before a second thread has woken up."""
    gemm_flops = 2 * _BUSY_ROWS * shape.hidden_size**2
    return machine.cores if gemm_flops > _ONE_THREAD_FLOPS else 1

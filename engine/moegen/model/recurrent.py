"""Layers that carry a state from token to token (gated delta rule, Mamba, short convolution, lightning attention).

The mathematics is transformers' own forward of such a module. It asks a cache for the states that it needs and hands
new ones back; here that cache is a view of exactly the states of the sequences at hand, gathered from their slots
before the call and put back after it. No mask goes in: there is no padding.

Which modules these are is seen in their code, which hands states to a cache. What they keep, and whether they take a
state for more than one token, is found out by running them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moegen.memory.state_pool import LayerStates, StatePool, States, StateShape
from moegen.schedule.slots import StateCall, state_calls
from moegen.schedule.step import AttentionBatch

_HANDING_BACK = frozenset({"update_conv_state", "update_recurrent_state", "set_linear_cache"})
_CACHE_NAMES = ("cache_params", "past_key_values")
_GATHERED_BYTES = 64 << 20  # of states that one call works on


class StateView:
    """What a module of transformers takes for its cache: the states of the S sequences of one call.

    It holds one layer's states, so `layer_idx` means nothing. Names and rules are those of transformers' `Cache`: a
    convolution's state is its last inputs, as many as its kernel is wide.
    """

    def __init__(self, states: States | None = None) -> None:
        """Without `states` the sequences begin with this call."""
        self.states: States = {} if states is None else states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states.get(f"conv {state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states.get(f"recurrent {state_idx}")

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self.states.get("linear")

    def update_conv_state(
        self, new_SCn: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """The inputs that the convolution sees: those before, if there are any, and the new ones."""
        before_SCK = self.states.get(f"conv {state_idx}")
        if before_SCK is None:
            width = conv_kernel_size or new_SCn.shape[-1]
            full = F.pad(new_SCn, (max(width - new_SCn.shape[-1], 0), 0))
        else:
            width = before_SCK.shape[-1]
            full = torch.cat([before_SCK, new_SCn], dim=-1)
        self.states[f"conv {state_idx}"] = full[..., -width:]
        return full

    def update_recurrent_state(self, new: torch.Tensor, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        self.states[f"recurrent {state_idx}"] = new
        return new

    def set_linear_cache(self, layer_idx: int, new: torch.Tensor) -> None:
        self.states["linear"] = new

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


def keeps_state(module: nn.Module) -> bool:
    """Whether the module's own code hands a state to a cache."""
    functions = (inspect.unwrap(f) for f in vars(type(module)).values() if callable(f) and not isinstance(f, type))
    names: Iterator[tuple[str, ...]] = (f.__code__.co_names for f in functions if hasattr(f, "__code__"))
    return any(not _HANDING_BACK.isdisjoint(used) for used in names)


class RecurrentModule(nn.Module):
    """Takes the place of a module that keeps a state.

    Attributes:
        current: the pass, or the micro-batch of it, in which the module is called: see `hear_of_passes`.
        one_by_one: it takes a state for single tokens only.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.current: Any = None
        self.one_by_one = False
        self._in_tuple = False
        self._per_token: tuple[bool, ...] = ()  # which parts of an answer, if it has several, are one thing per token
        parameters = list(inspect.signature(module.forward).parameters.values())
        self._hidden = parameters[0].name
        self._cache = next(p.name for p in parameters if p.name in _CACHE_NAMES)
        wanted = (p for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
        self._nothing = {p.name: None for p in wanted}  # positions, masks: no state depends on them

    def __getattr__(self, name: str) -> Any:
        """What others ask of the module is the module's to answer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_1TD = args[0] if args else kwargs[self._hidden]
        return self.current.recur(self, hidden_1TD)

    def call(self, hidden_SnD: torch.Tensor, view: StateView) -> list[torch.Tensor]:
        """transformers' own forward of n tokens of S sequences each -> what is there of each token, `[S, n, ...]`."""
        parts = _parts(self._run(hidden_SnD, view))
        return [part for part, counts in zip(parts, self._per_token, strict=True) if counts]

    def answer(self, parts: Sequence[torch.Tensor]) -> Any:
        """What the module's caller expects, of the parts that `call` gives."""
        given = iter(parts)
        whole = tuple(next(given) if counts else None for counts in self._per_token)
        return whole if self._in_tuple else whole[0]

    def find_out(self, hidden_11D: torch.Tensor) -> StateShape:
        """What the module keeps, and whether it takes all of that for more than one token. Runs it on a few.

        Which is seen in the bits: what is ignored changes none.
        """
        generator = torch.Generator().manual_seed(5)
        hidden_13D = torch.randn(1, 3, hidden_11D.shape[-1], generator=generator).to(hidden_11D)
        answer, kept = self._run(hidden_11D, StateView()), StateView()
        longer = _parts(self._run(hidden_13D, kept))
        self._in_tuple = not isinstance(answer, torch.Tensor)
        self._per_token = tuple(
            isinstance(one, torch.Tensor) and one.shape[:2] == (1, 1) and three.shape[:2] == (1, 3)
            for one, three in zip(_parts(answer), longer, strict=True)
        )
        self.one_by_one = any(self._ignores(name, kept.states, hidden_13D) for name in kept.states)
        return StateShape.of(kept.states)

    def _ignores(self, name: str, kept: States, hidden_13D: torch.Tensor) -> bool:
        """Whether nothing changes with this state, where there are several tokens."""
        states = [{n: torch.zeros_like(state) for n, state in kept.items()} for _ in range(2)]
        states[1][name] += 1
        zeros, ones = (self.call(hidden_13D, StateView(each)) for each in states)
        return all(torch.equal(a, b) for a, b in zip(zeros, ones, strict=True))

    def _run(self, hidden_SnD: torch.Tensor, view: StateView) -> Any:
        return self.module(**{**self._nothing, self._hidden: hidden_SnD, self._cache: view})


class ClampedSteps(nn.Module):
    """Takes the place of a Mamba-2 mixer's `in_proj`, whose last outputs become time steps, softplus(output + bias).

    transformers clamps them where there are several tokens, and does not where there is one. Clamped here, before the
    softplus, they are the same whether a token comes alone or with others.
    """

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.projection, self._bias_H = mixer.in_proj, mixer.dt_bias
        self._limits = [_before_softplus(limit) for limit in mixer.time_step_limit]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.projection(x)
        steps = out[..., -len(self._bias_H) :]
        low, high = (limit - self._bias_H.to(steps.dtype) for limit in self._limits)
        steps.copy_(steps.clamp(low, high))
        return out


def _before_softplus(value: float) -> float:
    if value <= 0:
        return -math.inf
    return value + math.log(-math.expm1(-value))  # log(exp(value) - 1) that does not overflow


def _clamps_steps(module: Any) -> bool:
    limits = getattr(module, "time_step_limit", None)
    parts = (getattr(module, name, None) for name in ("in_proj", "dt_bias"))
    return limits is not None and tuple(limits) != (0.0, math.inf) and all(part is not None for part in parts)


def hear_of_passes(model: nn.Module, listeners: Sequence[Any]) -> None:
    """Each of the `listeners` (modules with an attribute `current`) hears of the pass from the modules above it.

    A hook does it, for not every family hands the argument `moegen` down to them.
    """
    for module in model.modules():
        below = [inner for inner in module.modules() if inner in listeners]
        if below:
            module.register_forward_pre_hook(_tell(below), with_kwargs=True)


def _tell(below: list[Any]) -> Any:
    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (context := kwargs.get("moegen")) is not None:
            for inner in below:
                inner.current = context

    return tell


def place_recurrent(model: nn.Module) -> list[RecurrentModule]:
    """Puts a `RecurrentModule` in the place of every module that keeps a state."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if keeps_state(child)
    ]
    for parent, name, child in places:
        if _clamps_steps(child):
            child.in_proj = ClampedSteps(child)
        setattr(parent, name, RecurrentModule(child))
    return [module for module in model.modules() if isinstance(module, RecurrentModule)]


def recur(module: RecurrentModule, hidden_1TD: torch.Tensor, batch: AttentionBatch, pool: StatePool, visit: Any) -> Any:
    """The module's answer to the T tokens of a micro-batch, from slot to slot; micro-batches come in order."""
    if batch.first == 0:
        pool.begin(module, visit)
    layer = pool.layers[module]
    most = max(_GATHERED_BYTES // max(layer.shape.nbytes, 1), 1)
    outs: list[torch.Tensor] = []
    for whole in state_calls(batch, one_by_one=module.one_by_one):
        for call in whole.split(most):
            parts = _run(module, hidden_1TD, call, layer, pool)
            outs = outs or [part.new_empty(1, hidden_1TD.shape[1], *part.shape[2:]) for part in parts]
            rows_Sn = torch.from_numpy(call.rows).to(hidden_1TD.device)
            for out_1T, part_Sn in zip(outs, parts, strict=True):
                out_1T[0, rows_Sn] = part_Sn
    return module.answer(outs)


def _run(
    module: RecurrentModule, hidden_1TD: torch.Tensor, call: StateCall, layer: LayerStates, pool: StatePool
) -> list[torch.Tensor]:
    """One call: states out of their slots, through transformers' forward, back into their slots."""
    view = StateView()
    if not call.fresh:
        before = layer.gather(call.slots, hidden_1TD.device)
        pool.remember(call.slots, before)
        view = StateView(before)
    rows_Sn = torch.from_numpy(call.rows).to(hidden_1TD.device)
    parts = module.call(hidden_1TD[0, rows_Sn], view)
    layer.scatter(call.slots, view.states)
    return parts


def _parts(answer: Any) -> tuple[Any, ...]:
    return (answer,) if isinstance(answer, torch.Tensor) else tuple(answer)

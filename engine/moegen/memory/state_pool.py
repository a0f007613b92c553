"""Where recurrent layers keep what they carry from token to token: per layer, one tensor of slots for each state.

A layer's states have names and shapes of its own (a convolution's last inputs, a matrix per head, ...): they are what
transformers' code hands to its cache. A slot id means the same sequence in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moegen.ops.host_memory import host_zeros
from moegen.schedule.step import Ints

States = dict[str, torch.Tensor]
"""By name, `[S, ...]` of S sequences."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one layer carries of one sequence: name -> (shape, dtype)."""

    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, states: States) -> StateShape:
        """Of the states of some sequences."""
        return cls({name: (tuple(state.shape[1:]), state.dtype) for name, state in states.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())


class LayerStates:
    """The slots of one layer."""

    def __init__(self, shape: StateShape, slots: int, home: torch.device) -> None:
        """`home` has the slots: the host, or the device."""
        self.shape = shape
        self._tables = {name: _table((slots, *size), dtype, home) for name, (size, dtype) in shape.parts.items()}
        self._home = home

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def gather(self, slots_S: Ints, device: torch.device) -> States:
        """Copies of the states of these slots."""
        ids_S = torch.from_numpy(slots_S).to(self._home)
        return {name: table.index_select(0, ids_S).to(device) for name, table in self._tables.items()}

    def scatter(self, slots_S: Ints, states: States) -> None:
        """Puts states, all that the layer has, into these slots."""
        ids_S = torch.from_numpy(slots_S).to(self._home)
        for name, table in self._tables.items():
            table[ids_S] = states[name].to(table)


class StatePool:
    """Slots of every layer that keeps a state, under whatever names the layer.

    Work that a device had no room for begins anew, from the states that it began with; so a pool that `can_begin_anew`
    keeps those of the layer at hand until the next layer is at hand.
    """

    def __init__(
        self, shapes: Mapping[Any, StateShape], slots: int, home: torch.device, *, can_begin_anew: bool = False
    ) -> None:
        self.layers = {layer: LayerStates(shape, slots, home) for layer, shape in shapes.items()}
        self._can_begin_anew = can_begin_anew
        self._at_hand: Any = None
        self._before: list[tuple[Ints, States]] = []

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def begin(self, layer: Any, visit: Any) -> None:
        """The first micro-batch of `layer` in the pass `visit` comes: for the first time, or anew."""
        if self._at_hand == (layer, visit):
            for slots_S, states in reversed(self._before):
                self.layers[layer].scatter(slots_S, states)
        self._at_hand = (layer, visit)
        self._before.clear()

    def remember(self, slots_S: Ints, states: States) -> None:
        """These states of the layer at hand are about to change."""
        if self._can_begin_anew:
            self._before.append((slots_S, {name: state.clone() for name, state in states.items()}))


def _table(shape: tuple[int, ...], dtype: torch.dtype, home: torch.device) -> torch.Tensor:
    """Only what was written is ever read; on a host, slots that are never used cost no memory."""
    return host_zeros(shape, dtype) if home.type == "cpu" else torch.empty(shape, dtype=dtype, device=home)

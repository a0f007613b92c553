"""What recurrent layers carry of a sequence, from a config and the shapes of a model's tensors.

As `moegen.shape`, without code and without weights. What the layers do keep is found out when a model is loaded
(`moegen.model.recurrent`); the tests hold both to be the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

_OF_LAYER = re.compile(r"((?:model\.|language_model\.|backbone\.)*layers\.(\d+)\..+?)\.([^.]+)(?:\.weight)?")
_KEY_DIMS = ("linear_key_head_dim", "linear_head_dim", "mamba_d_state", "ssm_state_size")


def state_per_sequence(text: Any, tensors: Shapes) -> int:
    """Elements that all layers together carry of one sequence; 0 where every layer attends."""
    return sum(_carried(text, tensors, name, shape) for name, shape in tensors.items())


def recurrent_layers(text: Any, tensors: Shapes) -> set[int]:
    """Indices of the layers that carry a state and do not attend."""
    found = ((_OF_LAYER.fullmatch(name), _carried(text, tensors, name, shape)) for name, shape in tensors.items())
    return {int(match[2]) for match, elements in found if match and elements and "qkv_proj" not in match[1]}


def _carried(text: Any, tensors: Shapes, name: str, shape: tuple[int, ...]) -> int:
    """What there is of state for the sake of this tensor."""
    match = _OF_LAYER.fullmatch(name)
    if match is None or int(match[2]) >= text.num_hidden_layers:
        return 0
    mixer, part = match[1].removesuffix(".forget_gate"), match[3]
    if part in ("conv", "conv1d", "q_conv1d", "k_conv1d", "v_conv1d") and len(shape) == 3:
        return shape[0] * shape[2]  # a convolution's last inputs, as many as its kernel is wide
    if part in ("conv_qk_depthwise", "conv_qk_grouped") and len(shape) == 3:
        return shape[0] * (shape[2] - 1)
    if part == "v_proj_delayed":
        return shape[0]
    if part == "A_log":  # Mamba's matrix itself, or one number for each head of a matrix
        return math.prod(shape) if len(shape) == 2 else _width(tensors, mixer) * _key_dim(text)
    if part == "output_gate" and f"{mixer}.qkv_proj.weight" in tensors:  # lightning attention
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return _width(tensors, mixer) * int(head_dim)
    return 0


def _width(tensors: Shapes, mixer: str) -> int:
    """What goes into the mixer's last projection: the value dims of all heads."""
    return next((tensors[n][1] for n in (f"{mixer}.out_proj.weight", f"{mixer}.o_proj.weight") if n in tensors), 0)


def _key_dim(text: Any) -> int:
    return next((int(dim) for name in _KEY_DIMS if (dim := getattr(text, name, None))), 0)

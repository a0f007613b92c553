"""Checkpoints of random weights that are larger than any disk at hand.

Every tensor of the model is in the file's header, in its own name and shape, but layer l's bytes are those of layer
l mod `DISTINCT_LAYERS`: the header's offsets overlap. So the engine reads, keeps and moves each layer's weights as its
own, and only their values come again. transformers' own loader refuses such a file.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

DISTINCT_LAYERS = 2
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_BLOCK = 1 << 25  # elements drawn at once
_USUAL = {"dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}


def geometry(name: str, tiny: bool) -> Any:
    """`mixtral` (8x7B) or `qwen3` (30B-A3B) as published, or a tiny model of the same kind."""
    if name == "mixtral":
        sizes: dict[str, Any] = {"sliding_window": None, "architectures": ["MixtralForCausalLM"], **_USUAL}
        if tiny:
            sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
                      "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 1024}  # fmt: skip
        return MixtralConfig(**sizes)
    sizes = {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, **_USUAL}
    if tiny:
        sizes |= {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                  "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16,
                  "num_experts_per_tok": 4, "vocab_size": 256, "max_position_embeddings": 1024}  # fmt: skip
    else:
        sizes |= {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
                  "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                  "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936,
                  "max_position_embeddings": 40_960}  # fmt: skip
    return Qwen3MoeConfig(**sizes)


def stored_bytes(config: Any) -> int:
    """What the file of this model takes."""
    return sum(2 * math.prod(shape) for shape in _distinct(_shapes(config)).values())


def write_checkpoint(folder: Path, config: Any, device: torch.device) -> None:
    """config.json and model.safetensors, in bfloat16. Numbers are drawn on `device`, where that is faster."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = _shapes(config)
    distinct = _distinct(shapes)
    places, end = {}, 0
    for name, shape in distinct.items():
        places[name] = (end, end := end + 2 * math.prod(shape))
    header = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": list(places[_source(name)])}
        for name, shape in shapes.items()
    }
    generator = torch.Generator(device).manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 4096)
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in distinct.values():
            _write_values(file, shape, generator)
    config.save_pretrained(folder)  # last: a folder that has it is whole


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _distinct(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if _source(name) == name}


def _source(name: str) -> str:
    """The tensor that has the values of this one."""
    return _LAYER.sub(lambda match: str(int(match[0]) % DISTINCT_LAYERS), name, count=1)


def _write_values(file: BinaryIO, shape: tuple[int, ...], generator: torch.Generator) -> None:
    elements = math.prod(shape)
    for first in range(0, elements, _BLOCK):
        count = min(_BLOCK, elements - first)
        if len(shape) > 1:
            values = torch.randn(count, generator=generator, device=generator.device).mul_(0.02)
        else:
            values = torch.ones(count)  # norms
        file.write(values.bfloat16().cpu().view(torch.uint8).numpy().data)

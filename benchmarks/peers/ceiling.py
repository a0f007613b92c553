"""What the machine's arithmetic would allow: its best GEMM rate, and the operations that the rows need."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig
from turn import Row

_SHAPES = {"square": (1, 2048, 2048, (2048,)), "experts": (24, 768, 1024, (256, 1024, 2048))}  # weights, out, in, rows


def gemm_peaks() -> dict[str, float]:
    """The best FLOP/s of each dtype over a square product and expert-shaped ones at several row counts."""
    return {
        str(dtype).removeprefix("torch."): max(
            _flops_per_s(dtype, weights, out, width, rows)
            for weights, out, width, counts in _SHAPES.values()
            for rows in counts
        )
        for dtype in (torch.float32, torch.bfloat16)
    }


@torch.inference_mode()
def _flops_per_s(dtype: torch.dtype, weights: int, out: int, width: int, rows: int, repeats: int = 4) -> float:
    matrices = torch.randn(weights, out, width).to(dtype)
    x = torch.randn(rows, width).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for matrix in matrices:
            F.linear(x, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * out * width * weights / best


def needed_flops(model: Qwen3MoeConfig, rows: Sequence[Row], *, narrow_end: bool = False) -> float:
    """Of active parameters, the output head only where a token is sampled, and of attention's two products.

    `narrow_end`: in the last layer, tokens from which nothing is sampled stop after attention, as in moegen. Else every
    token meets every layer, as is usually counted.
    """
    head = model.vocab_size * model.hidden_size
    query = model.num_attention_heads * model.head_dim
    flops = 0.0
    for row in rows:
        computed = row.tokens - 1  # the last generated token is never put through the model
        flops += 2 * model.num_hidden_layers * _layer_weights(model) * computed + 2 * head * row.answer_tokens
        flops += 4 * query * model.num_hidden_layers * computed * (computed + 1) / 2
        if narrow_end:
            flops -= 2 * model.hidden_size * _mlp_width(model) * (computed - row.answer_tokens)
    return flops


def _layer_weights(model: Qwen3MoeConfig) -> int:
    """Matrix elements of one layer that one token meets."""
    query, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    return model.hidden_size * (2 * query + 2 * kv + _mlp_width(model))


def _mlp_width(model: Qwen3MoeConfig) -> int:
    """Of the router, and of a token's experts with their three matrices."""
    return model.num_experts + model.num_experts_per_tok * 3 * model.moe_intermediate_size

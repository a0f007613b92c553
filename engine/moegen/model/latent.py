"""Latent attention as transformers writes it: what such a module keeps of a token is its latent.

transformers' own code makes the query, the latent (after its norm, and whatever else a family does to it) and the
rotary part that all heads share; then `expand_kv` turns these into keys and values of every head. That method is the
seam: it is replaced by one that hands latent and rotary part on as they are, and the layer's up-projections go to
`moegen.ops.latent_heads`. So rotary embeddings, interleaved or not, YaRN's factor in the softmax's scale, norms and
gates of every family stay transformers' business.

A module is one of latent attention if it has `expand_kv` and the parts that it is known to be made of; whether it
means what they say is for `moegen.run.certify` to find out. Any other keeps expanded heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moegen.ops.latent_heads import LatentHeads

_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def keep_latents(model: nn.Module, stored: torch.dtype) -> int:
    """Makes every module of latent attention keep latents; how many there are.

    Their up-projections are kept in `stored` where the CPU's kernel widens them as it reads.
    """
    found = [module for module in model.modules() if _is_latent(module)]
    for module in found:
        _keep_latents(module, stored)
    return len(found)


def _is_latent(module: Any) -> bool:
    """By its parts: whole numbers for its dims, and one matrix without a bias that expands all heads."""
    up = getattr(module, "kv_b_proj", None)
    if not callable(getattr(module, "expand_kv", None)) or type(up) is not nn.Linear or up.bias is not None:
        return False
    rank, nope_dim, rope_dim, value_dim = (getattr(module, name, None) for name in _DIMS)
    if not all(isinstance(dim, int) and dim > 0 for dim in (rank, nope_dim, rope_dim, value_dim)):
        return False
    return up.in_features == rank and up.out_features % (nope_dim + value_dim) == 0


def _keep_latents(module: Any, stored: torch.dtype) -> None:
    up, nope_dim = module.kv_b_proj, module.qk_nope_head_dim
    heads = up.out_features // (nope_dim + module.v_head_dim)
    module.moegen_latent = LatentHeads.of(up.weight, heads, nope_dim, stored)
    module.expand_kv = _as_kept
    del module.kv_b_proj


def _as_kept(latent_11TR: torch.Tensor, rope_11TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of one KV head: the token as it is kept, of which the latent comes first."""
    return torch.cat([latent_11TR, rope_11TE], dim=-1), latent_11TR

"""Latent attention: what lies between a token's latent and its H heads (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A token keeps `[c, k_rope]`: its latent c of `rank` elements and a rotary key that all heads share. Head h has the key
`[W_UK(h) c, k_rope]` and the value `W_UV(h) c`. So a score is

    q_nope . W_UK(h) c + q_rope . k_rope  =  [W_UK(h)^T q_nope, q_rope] . [c, k_rope]

and a weighted sum of values is W_UV(h) times the same sum of latents: with the up-projections *absorbed* into query and
answer, all heads attend to the tokens as they are kept. *Expanding* the heads instead makes a pair of query and key
cheaper and costs a product per key. Which one takes fewer multiplications depends on how many queries meet how many
keys: one absorbs to decode, and expands to attend a prompt. Expanded heads exist for a few heads at a time.

Shape suffixes: T, S tokens, L keys, H heads, h some of them, N dims without rotation, E rotary dims, V value dims,
R rank, W = R + E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moegen.ops.expert_weights import ExpertMatrix, PanelMatrix, PlainMatrix

_EXPANDED_BYTES = 32 << 20  # keys and values that are expanded at once, about
_ABSORBED_BYTES = 32 << 20  # absorbed queries and their answers that exist at once, about

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries `[T, h, D]`, keys `[G, L, D]`, values `[G, L, V]` -> answers `[T, h, V]`, G dividing h."""


@dataclass(frozen=True)
class LatentHeads:
    """The up-projections of one layer, each a stack of H matrices."""

    nope_dim: int
    value_dim: int
    rank: int
    absorbing: ExpertMatrix  # W_UK^T: rank from N
    keys: ExpertMatrix  # W_UK: N from rank
    values: ExpertMatrix  # W_UV: V from rank

    @classmethod
    def of(cls, weight_OR: torch.Tensor, heads: int, nope_dim: int, stored: torch.dtype) -> LatentHeads:
        """From the matrix that expands all heads' keys and values, `[H * (N + V), R]`: head after head, key first.

        On a CPU that computes in float32 they are kept in `stored`; elsewhere they are views of the matrix.
        """
        weight_HOR = weight_OR.detach().unflatten(0, (heads, -1))
        up_HNR, up_HVR = weight_HOR[:, :nope_dim], weight_HOR[:, nope_dim:]
        absorbing, keys, values = (
            _stack(w, stored) for w in (up_HNR.transpose(1, 2), up_HNR, up_HVR)
        )  # fmt: skip
        return cls(nope_dim, up_HVR.shape[1], weight_OR.shape[1], absorbing, keys, values)

    @property
    def heads(self) -> int:
        return self.keys.experts

    @property
    def nbytes(self) -> int:
        """Memory beyond the matrix that was given."""
        parts = (self.absorbing, self.keys, self.values)
        return sum(part.nbytes for part in parts if not isinstance(part, PlainMatrix))

    def absorb(self, query_SHD: torch.Tensor) -> torch.Tensor:
        """Queries for the tokens as they are kept, `[S, H, W]`."""
        nope_SHR = _by_head(self.absorbing, query_SHD[..., : self.nope_dim])
        return torch.cat([nope_SHR.to(query_SHD.dtype), query_SHD[..., self.nope_dim :]], dim=-1)

    def lift(self, latent_SHR: torch.Tensor) -> torch.Tensor:
        """Answers `[S, H, V]` of sums of latents."""
        return _by_head(self.values, latent_SHR)

    def absorbed(self, tokens: int, width: int) -> int:
        """How many of `tokens` queries to absorb at once."""
        return max(min(_ABSORBED_BYTES // (4 * self.heads * (width + self.rank)), tokens), 1)

    def attend_span(self, query_THD: torch.Tensor, kept_LW: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Answers `[T, H, V]` of queries over tokens as they are kept, by the cheaper of both ways."""
        if self._absorbing_pays(len(query_THD), *kept_LW.shape):
            latent_THR = attend(self.absorb(query_THD), kept_LW[None], kept_LW[None, :, : self.rank])
            return self.lift(latent_THR)
        out_THV = query_THD.new_empty(*query_THD.shape[:2], self.value_dim)
        for own, keys_hLD, values_hLV in self._expanded(kept_LW):
            out_THV[:, own] = attend(query_THD[:, own], keys_hLD, values_hLV)
        return out_THV

    def _absorbing_pays(self, queries: int, keys: int, width: int) -> bool:
        """By multiplications of one head."""
        projection, pairs = self.rank * (self.nope_dim + self.value_dim), queries * keys
        expanded = self.nope_dim + width - self.rank + self.value_dim
        return queries * projection + pairs * (width + self.rank) < keys * projection + pairs * expanded

    def _expanded(self, kept_LW: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Keys and values of some heads at a time, `[h, L, ...]`."""
        length, width = kept_LW.shape
        rope_LE = kept_LW[:, self.rank :]
        laid_LR = self.keys.lay_out(kept_LW[:, : self.rank])
        head_bytes = 4 * length * (self.nope_dim + width - self.rank + self.value_dim)
        some = min(max(_EXPANDED_BYTES // head_bytes, 1), self.heads)
        for first in range(0, self.heads, some):
            own = slice(first, min(first + some, self.heads))
            count = own.stop - own.start
            counts = [length if own.start <= head < own.stop else 0 for head in range(self.heads)]
            tokens = torch.arange(length, device=kept_LW.device).repeat(count)
            nope_hLN, values_hLV = (
                part.linear(laid_LR, counts, tokens).unflatten(0, (count, length)).to(kept_LW.dtype)
                for part in (self.keys, self.values)
            )
            yield own, torch.cat([nope_hLN, rope_LE.expand(count, -1, -1)], dim=-1), values_hLV


def _by_head(stack: ExpertMatrix, x_SHI: torch.Tensor) -> torch.Tensor:
    """Each head's rows times its own matrix, `[S, H, O]`."""
    tokens, heads, _ = x_SHI.shape
    out_HSO = stack.linear(x_SHI.transpose(0, 1).flatten(0, 1), [tokens] * heads).unflatten(0, (heads, tokens))
    return out_HSO.transpose(0, 1)


def _stack(weight_HOI: torch.Tensor, stored: torch.dtype) -> ExpertMatrix:
    if weight_HOI.device.type != "cpu" or weight_HOI.dtype != torch.float32:
        return PlainMatrix(weight_HOI)
    exact = torch.equal(weight_HOI.to(stored).to(weight_HOI.dtype), weight_HOI)
    heads, out_features, in_features = weight_HOI.shape
    stack = PanelMatrix(heads, out_features, in_features, stored if exact else weight_HOI.dtype)
    for head, matrix_OI in enumerate(weight_HOI):
        stack.place(head, 0, matrix_OI)
    return stack

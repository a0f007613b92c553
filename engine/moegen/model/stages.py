"""The plain pre-norm decoder layer as two stages, so that attention and experts have batch sizes of their own.

    h = h + self_attn(input_layernorm(h))            attention stage, or a recurrent module's: in micro-batches
    h = h + mlp(post_attention_layernorm(h))         expert stage: every token of the pass

After the model's last attention nothing looks at a token any more but the head: its last expert stage is for the tokens
that the head is asked about. Of a prompt that is the last one.

`StagedLayer` takes a layer's place in the model. Whether a family's layers are of this shape is not guessed from their
attributes: `moegen.run.certify` compares the staged model with transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moegen.model.seams import PassContext
from moegen.model.sparse import cut
from moegen.ops.expert_weights import empty_rows, laid_out
from moegen.schedule.step import AttentionBatch

_PARTS = (  # by the names that families have for them
    ("input_layernorm", "operator_norm"),
    ("self_attn", "linear_attn", "mamba", "conv"),
    ("post_attention_layernorm", "pre_ff_layernorm", "ffn_norm"),
    ("mlp", "feed_forward"),
)


def plain_parts(layer: nn.Module) -> list[Any] | None:
    """The four modules of a pre-norm layer, if it has them; what it does with them is for certify to say."""
    found = [[part for name in names if isinstance(part := getattr(layer, name, None), nn.Module)] for names in _PARTS]
    return [part for (part,) in found] if all(len(parts) == 1 for parts in found) else None


class StagedLayer(nn.Module):
    """Runs `layer` stage by stage; the keyword argument `moegen` is the pass.

    The `last` layer of a model answers only for the tokens that the pass keeps; of others it gives what came out of
    attention. What a model asks its layers for is read from `layer`; the parts are those that it had at first.
    """

    def __init__(self, layer: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.layer, self._last = layer, last
        parts = plain_parts(layer)
        assert parts is not None
        self._parts = tuple(parts)  # found once: they are asked for in every pass, and modules are slow to look up

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its layers: `attention_type`, `layer_type`, ..."""
        layer = self.__dict__["_modules"]["layer"]
        return layer if name == "layer" else getattr(layer, name)

    def forward(self, hidden_1TD: torch.Tensor, *, moegen: PassContext, **kwargs: Any) -> torch.Tensor:
        mlp = self._parts[-1]
        after_1TD, normed_1TD = moegen.in_batches(lambda batches: self._attend(hidden_1TD, batches, moegen, kwargs))
        kept_S = moegen.kept if self._last else None
        if kept_S is None:
            return after_1TD.add_(_first(mlp(normed_1TD)))
        more_1SD = _first(mlp(normed_1TD[:, kept_S]))
        return after_1TD.index_add_(1, kept_S, more_1SD.to(after_1TD.dtype))

    def _attend(
        self, hidden_1TD: torch.Tensor, batches: Sequence[AttentionBatch], moegen: PassContext, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after attention, and what the experts are to see of them: normed while it is in the cache."""
        norm, mixer, next_norm, _ = self._parts
        if len(batches) == 1:
            attended = mixer(hidden_states=norm(hidden_1TD), moegen=moegen.within(batches[0]), **kwargs)
            after_1TD = hidden_1TD + _first(attended)
            normed_1TD = next_norm(after_1TD)
            return after_1TD, laid_out(normed_1TD[0], normed_1TD.dtype)[None]
        after_1TD, normed_1TD = torch.empty_like(hidden_1TD), empty_rows(hidden_1TD)
        for batch in batches:
            own, x_1tD = batch.own, hidden_1TD[:, batch.own]
            narrowed = {name: cut(value, own, moegen.tokens) for name, value in kwargs.items()}
            attended = mixer(hidden_states=norm(x_1tD), moegen=moegen.within(batch), **narrowed)
            normed_1TD[:, own] = next_norm(torch.add(x_1tD, _first(attended), out=after_1TD[:, own]))
        return after_1TD, normed_1TD


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output

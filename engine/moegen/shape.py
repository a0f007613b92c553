"""What a checkpoint is made of, in bytes, elements and counts: from its config.json and its safetensors headers.

No weights are read and no torch is needed, so that a laptop can plan for a model that it could never load.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from moegen.errors import CheckpointError, InputError, SpecError, UnsupportedModel
from moegen.storage import describe, join, list_names, open_input, read_bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1,
                 "U8": 1, "BOOL": 1}  # fmt: skip
_KV_PROJECTION = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.self_attn\.[kv]_proj\.weight")
_EXPERT_NAMES = (".experts.", ".block_sparse_moe.input_linear", ".block_sparse_moe.output_linear")


@dataclass(frozen=True)
class ModelShape:
    """Counts are of elements unless the name says bytes."""

    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    heads: int
    experts: int  # per MoE layer; 0 when the model has none
    experts_per_token: int
    max_position_embeddings: int
    dtype: str  # of the checkpoint
    weights: int  # all parameters
    expert_weights: int  # those of routed experts
    kv_per_token: int  # keys and values of one token over all layers, as the engine keeps them
    latent_kv_per_token: int | None  # what latent attention would need if the latent itself were kept

    @classmethod
    def read(cls, model_uri: str) -> ModelShape:
        """From a local folder or any fsspec URI of one.

        Raises:
            CheckpointError: there is no such checkpoint, or a file of it is damaged.
            UnsupportedModel: the installed transformers does not know the model type.
        """
        return cls.of(read_config(model_uri), _stored_tensors(model_uri))

    @classmethod
    def of(cls, config: Any, tensors: dict[str, tuple[int, ...]]) -> ModelShape:
        """From a transformers config and the shapes of the stored tensors."""
        text = config.get_text_config()
        sizes = {name: _product(shape) for name, shape in tensors.items()}
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") or 0
        dtype = str(getattr(text, "dtype", None) or getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        return cls(
            model_type=config.model_type,
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            heads=text.num_attention_heads,
            experts=experts,
            experts_per_token=(_first(text, "num_experts_per_tok", "moe_topk", "moe_k") or 0) if experts else 0,
            max_position_embeddings=getattr(text, "max_position_embeddings", None) or 1 << 30,
            dtype=dtype,
            weights=sum(sizes.values()),
            expert_weights=sum(n for name, n in sizes.items() if any(part in name for part in _EXPERT_NAMES)),
            kv_per_token=_kv_per_token(text, tensors),
            latent_kv_per_token=_latent_kv_per_token(text),
        )

    @property
    def active_weights(self) -> float:
        """Parameters that one token multiplies with: all but the experts that it is not routed to."""
        share = self.experts_per_token / self.experts if self.experts else 0.0
        embedding = self.vocab_size * self.hidden_size  # looked up, not multiplied
        return self.weights - embedding - self.expert_weights * (1 - share)

    @property
    def flops_per_token(self) -> float:
        """A multiply and an add per active parameter; attention's own products come on top."""
        return 2 * self.active_weights


def read_config(model_uri: str) -> Any:
    """The checkpoint's config as transformers understands it, its defaults filled in. Raises as `ModelShape.read`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        values = json.loads(read_bytes(join(model_uri, "config.json")))
    except InputError as error:
        raise CheckpointError(f"model.uri: no config.json in {model_uri!r}; give a checkpoint's folder") from error
    except ValueError as error:
        raise CheckpointError(f"model.uri: config.json in {model_uri!r} is not valid JSON: {error}") from error
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"model.uri: model type {model_type!r} of {model_uri!r} is unknown to the installed transformers; "
            "code that comes with a checkpoint is never run"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(
            f"model.uri: {model_uri!r} stores weights compressed ({method}), which this version cannot read; "
            "give a float32, bfloat16 or float16 checkpoint"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:
        raise CheckpointError(f"model.uri: config.json in {model_uri!r} is no {model_type} config: {error}") from error


def _stored_tensors(model_uri: str) -> dict[str, tuple[int, ...]]:
    names = [name for name in list_names(model_uri) if name.endswith(".safetensors")]
    if not names:
        raise CheckpointError(f"model.uri: no *.safetensors files in {model_uri!r}; other weight formats are not read")
    tensors: dict[str, tuple[int, ...]] = {}
    for name in names:
        tensors.update(_header(join(model_uri, name)))
    return tensors


def _header(uri: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one file's tensors; checks that the file is as long as they say."""
    size = describe(uri).size_bytes
    with open_input(uri, "random") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{uri}: is not a whole safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{uri}: its safetensors header is damaged; fetch it again") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise CheckpointError(f"{uri}: has {size} bytes where its header promises {end}; fetch it again")
    for name, entry in header.items():
        if entry["dtype"] not in _STORED_BYTES:
            raise SpecError(f"{uri}: tensor {name} is stored as {entry['dtype']}, which this version cannot read")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _kv_per_token(text: Any, tensors: dict[str, tuple[int, ...]]) -> int:
    """Expanded heads for latent attention, grouped heads otherwise; as stored, where each layer stores them apart.

    A family may give its layers different heads by a rule that only its code knows.
    """
    heads = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None):
        return int(text.num_hidden_layers * heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim))
    stored = [shape[0] for name, shape in tensors.items() if _is_kv_projection(name, text.num_hidden_layers)]
    if len(stored) == 2 * text.num_hidden_layers:
        return sum(stored)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    key_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    value_dim = getattr(text, "v_head_dim", None) or key_dim
    return int(text.num_hidden_layers * kv_heads * (key_dim + value_dim))


def _is_kv_projection(name: str, layers: int) -> bool:
    """Of a decoder layer: not of a vision tower, nor of the extra layers that predict further tokens."""
    match = _KV_PROJECTION.fullmatch(name)
    return match is not None and int(match[1]) < layers


def _latent_kv_per_token(text: Any) -> int | None:
    if not getattr(text, "kv_lora_rank", None):
        return None
    return int(text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim))

"""What a checkpoint is made of, in bytes, elements and counts: from its config.json and its safetensors headers.

No weights are read and no torch is needed, so that a laptop can plan for a model that it could never load.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

from moegen.coding import CodedTensor, coded_tensors, logical_tensors
from moegen.errors import CheckpointError, InputError, SpecError, UnsupportedModel
from moegen.state_shape import recurrent_layers, state_per_sequence
from moegen.storage import describe, join, list_names, open_input, read_bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
                 "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit
_KV_PROJECTION = re.compile(
    r"(?:model\.|language_model\.|backbone\.)*layers\.(\d+)\.(?:self_attn|mixer)\.[kv]_proj\.weight"
)
_INDEX_KEY = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.self_attn\.indexer\.wk\.weight")
_EXPERTS_OF_LAYER = re.compile(r"layers\.(\d+)\.(?:.*\.)?(?:experts|block_sparse_moe\.(?:in|out)put_linear)\.")
_SLIDING, _FULL = "sliding_attention", "full_attention"
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
    kv_per_token: int  # keys and values of all heads, of one token over all layers
    latent_kv_per_token: int | None  # of latent attention: latents and their rotary parts
    moe_layers: int  # layers that have routed experts
    attention_width: int  # elements of one layer's queries and attended values of a token, over all heads
    tied_head: bool  # the head multiplies with the embedding's own weights
    # Of latent attention, else 0:
    absorbed_width: int = 0  # elements of one layer's queries and attended sums of latents of a token, over all heads
    key_up_weights: int = 0  # what makes keys of latents, over all layers
    stored_format: str | None = None  # of experts in few bits on disk: fp8, mxfp4, int4, ...; None: of `dtype`
    expert_stored_bytes: int | None = None  # of experts in few bits on disk, scales and zeros included
    expert_coded_bytes: int = 0  # the same in memory
    coded_dense_weights: int = 0  # weights outside the experts that are in few bits on disk: expanded when loaded
    kept_as: Literal["as_stored", "int8", "fp8"] = "as_stored"  # what plain experts become in memory
    state_per_sequence: int = 0  # of recurrent layers, which keep it beside the keys and values of those that attend
    windows: tuple[int | None, ...] = ()  # of every layer's attention; empty: none has one, or not all are alike

    @classmethod
    def read(cls, model_uri: str) -> ModelShape:
        """From a local folder or any fsspec URI of one.

        Raises:
            CheckpointError: there is no such checkpoint, or a file of it is damaged.
            UnsupportedModel: the installed transformers does not know the model type.
        """
        config = read_config(model_uri)
        tensors = model_tensors(model_uri)
        shapes = {name: t.parameter_shape if isinstance(t, CodedTensor) else t.shape for name, t in tensors.items()}
        coded = [tensor for name, tensor in coded_tensors(tensors) if _is_expert(name)]
        of_experts = [tensor for name, tensor in tensors.items() if _is_expert(name)]
        return replace(
            cls.of(config, shapes),
            stored_format=coded[0].coding.format if coded else None,
            expert_stored_bytes=sum(tensor.nbytes for tensor in of_experts) if coded else None,
            expert_coded_bytes=sum(t.memory_bytes if isinstance(t, CodedTensor) else t.nbytes for t in of_experts),
            coded_dense_weights=sum(_product(t.shape) for name, t in coded_tensors(tensors) if not _is_expert(name)),
        )

    def kept(self, weights: Literal["as_stored", "int8", "fp8"]) -> ModelShape:
        """The same with its experts as `model.weights` wants them in memory.

        Raises:
            SpecError: they are in few bits already.
        """
        if weights != "as_stored" and self.stored_format is not None:
            raise SpecError(
                f"model.weights: {weights!r} cannot be made of experts that are stored as {self.stored_format}; "
                "leave it out, or give the model's float32, bfloat16 or float16 checkpoint"
            )
        return replace(self, kept_as=weights)

    def stored_in(self, bits: int) -> ModelShape:
        """The same model with its experts stored in so many bits, with a scale of two bytes, in memory four, for 64
        weights."""
        stored, coded = (int(self.expert_weights * (bits / 8 + scale / 64)) for scale in (2, 4))
        return replace(self, stored_format=f"int{bits}", expert_stored_bytes=stored, expert_coded_bytes=coded)

    @property
    def in_few_bits(self) -> bool:
        """Whether experts are codes and scales in memory."""
        return self.stored_format is not None or self.kept_as != "as_stored"

    @classmethod
    def of(cls, config: Any, tensors: dict[str, tuple[int, ...]]) -> ModelShape:
        """From a transformers config and the shapes of the model's tensors."""
        text = config.get_text_config()
        sizes = {name: _product(shape) for name, shape in tensors.items()}
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") or 0
        dtype = str(getattr(text, "dtype", None) or getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        return cls(
            model_type=config.model_type,
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            heads=max(layer.num_attention_heads for layer in _layer_configs(text)),
            experts=experts,
            experts_per_token=(_first(text, "num_experts_per_tok", "moe_topk", "moe_k") or 0) if experts else 0,
            max_position_embeddings=getattr(text, "max_position_embeddings", None) or 1 << 30,
            dtype=dtype,
            weights=sum(sizes.values()),
            expert_weights=sum(n for name, n in sizes.items() if _is_expert(name)),
            kv_per_token=_kv_per_token(text, tensors),
            latent_kv_per_token=_latent_kv_per_token(text, tensors),
            moe_layers=len({match[1] for name in tensors if (match := _EXPERTS_OF_LAYER.search(name))}),
            attention_width=_attention_width(text),
            tied_head=not any(name.endswith("lm_head.weight") for name in tensors),
            absorbed_width=_absorbed_width(text),
            key_up_weights=_key_up_weights(text, tensors),
            state_per_sequence=state_per_sequence(text, tensors),
            windows=_windows(text, tensors),
        )

    @property
    def active_weights(self) -> float:
        """Parameters that one token multiplies with: all but the experts that it is not routed to."""
        share = self.experts_per_token / self.experts if self.experts else 0.0
        embedding = 0 if self.tied_head else self.vocab_size * self.hidden_size  # looked up, not multiplied
        return self.weights - embedding - self.expert_weights * (1 - share)

    @property
    def flops_per_token(self) -> float:
        """A multiply and an add per active parameter; attention's own products come on top."""
        return 2 * self.active_weights


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies: `nbytes` bytes of the file `uri` from byte `start` on, in C order."""

    uri: str
    dtype: str  # in safetensors' words: F32, BF16, ...
    shape: tuple[int, ...]
    start: int
    nbytes: int


def config_json(model_uri: str) -> dict[str, Any]:
    """What config.json says. Raises `CheckpointError` when it is not there or no JSON object."""
    try:
        values = json.loads(read_bytes(join(model_uri, "config.json")), object_hook=_special_float)
    except InputError as error:
        raise CheckpointError(f"model.uri: no config.json in {model_uri!r}; give a checkpoint's folder") from error
    except ValueError as error:
        raise CheckpointError(f"model.uri: config.json in {model_uri!r} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"model.uri: config.json in {model_uri!r} is no JSON object; give a checkpoint's folder")
    return values


def _special_float(values: dict[str, Any]) -> Any:
    """JSON has no infinity; transformers writes `{"__float__": "Infinity"}`."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def read_config(model_uri: str) -> Any:
    """The checkpoint's config as transformers understands it, its defaults filled in. Raises as `ModelShape.read`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = config_json(model_uri)
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"model.uri: model type {model_type!r} of {model_uri!r} is unknown to the installed transformers; "
            "code that comes with a checkpoint is never run"
        )
    values.pop("quantization_config", None)  # says how weights are stored, not what is done with them
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:
        raise CheckpointError(f"model.uri: config.json in {model_uri!r} is no {model_type} config: {error}") from error


def weight_files(model_uri: str) -> list[str]:
    """The URIs of the safetensors files that make the model, sorted: those of the index, or the one, or all.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    there = list_names(model_uri)
    names = [name for name in there if name.endswith(".safetensors")]
    if not names:
        raise CheckpointError(f"model.uri: no *.safetensors files in {model_uri!r}; other weight formats are not read")
    if _INDEX in there:
        names = _indexed(join(model_uri, _INDEX))
    elif _SINGLE in there:
        names = [_SINGLE]  # what lies beside it is another format's copy
    missing = sorted(set(names) - set(there))
    if missing:
        raise CheckpointError(
            f"model.uri: {model_uri!r} lacks {', '.join(missing[:3])} ({len(missing)} of {len(names)} files that its "
            "index names); fetch the checkpoint again"
        )
    return [join(model_uri, name) for name in names]


def _indexed(uri: str) -> list[str]:
    try:
        return sorted(set(json.loads(read_bytes(uri))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{uri}: is no index of safetensors files; fetch it again") from error


def stored_tensors(model_uri: str) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by its stored name.

    Raises:
        CheckpointError: no safetensors files, or one whose header is damaged or promises other bytes than it has.
    """
    tensors: dict[str, StoredTensor] = {}
    for uri in weight_files(model_uri):
        tensors.update(_tensors_of(uri))
    return tensors


def model_tensors(model_uri: str) -> dict[str, StoredTensor | CodedTensor]:
    """As `stored_tensors`, by the names that the model has for them: matrices in few bits are `CodedTensor`s.

    Raises:
        CheckpointError: as `stored_tensors`; or a part of a matrix is missing or has another shape.
        UnsupportedModel: a format that is not read.
    """
    quantization = config_json(model_uri).get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"model.uri: quantization_config in {model_uri!r} is no JSON object")
    return logical_tensors(stored_tensors(model_uri), quantization)


def read_header(uri: str, size: int, file: BinaryIO) -> bytes:
    """The safetensors header (JSON) at the beginning of a file of `size` bytes, which is left behind it."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(_HEADER_LIMIT_BYTES, size - 8):
        raise CheckpointError(f"{uri}: is not a whole safetensors file ({size} bytes); fetch it again")
    return file.read(length)


def _tensors_of(uri: str) -> dict[str, StoredTensor]:
    size = describe(uri).size_bytes
    with open_input(uri, "random") as file:
        data = read_header(uri, size, file)
    try:
        header = json.loads(data)
        header.pop("__metadata__", None)
        tensors = {name: _stored(uri, 8 + len(data), entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{uri}: its safetensors header is damaged; fetch it again") from error
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=8 + len(data))
    if end != size:
        raise CheckpointError(f"{uri}: has {size} bytes where its header promises {end}; fetch it again")
    for name, tensor in tensors.items():
        _check(name, tensor)
    return tensors


def _stored(uri: str, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    first, end = entry["data_offsets"]
    return StoredTensor(uri, entry["dtype"], tuple(entry["shape"]), data_start + first, end - first)


def _check(name: str, tensor: StoredTensor) -> None:
    if tensor.dtype not in _STORED_BYTES:
        raise SpecError(f"{tensor.uri}: tensor {name} is stored as {tensor.dtype}, which this version cannot read")
    needed = _product(tensor.shape) * _STORED_BYTES[tensor.dtype]
    if tensor.nbytes != needed:
        raise CheckpointError(
            f"{tensor.uri}: tensor {name} has {tensor.nbytes} bytes where {tensor.dtype} {list(tensor.shape)} takes "
            f"{needed}; fetch the file again"
        )


def _is_expert(name: str) -> bool:
    return any(part in name for part in _EXPERT_NAMES)


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
    layers = _attending(text, tensors)
    if _rank(layers[0]):
        return sum(_expanded_width(layer) for layer in layers) + _index_keys(text, tensors)
    stored = [shape[0] for name, shape in tensors.items() if _is_kv_projection(name, text.num_hidden_layers)]
    if len(stored) == 2 * text.num_hidden_layers or recurrent_layers(text, tensors):
        return sum(stored)
    return sum(_heads_kv(layer) for layer in layers)


def _heads_kv(layer: Any) -> int:
    """Keys and values of one layer's heads, as its config says."""
    heads = layer.num_attention_heads
    key_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    value_dim = getattr(layer, "v_head_dim", None) or key_dim
    return int((getattr(layer, "num_key_value_heads", None) or heads) * (key_dim + value_dim))


def _layer_configs(text: Any) -> list[Any]:
    """What the config says for each layer, where it says something for single ones."""
    return list(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)


def _attending(text: Any, tensors: dict[str, tuple[int, ...]]) -> list[Any]:
    """The configs of the layers that keep keys and values; where none does, of one that would."""
    recurrent = recurrent_layers(text, tensors)
    layers = _layer_configs(text)
    return [layer for index, layer in enumerate(layers) if index not in recurrent] or layers[:1]


def _rank(layer: Any) -> int:
    """Of latent attention, else 0."""
    return int(getattr(layer, "kv_lora_rank", None) or 0)


def _expanded_width(layer: Any) -> int:
    """Keys and values of one layer's heads that are made of latents."""
    return int(layer.num_attention_heads * (layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim))


def _index_keys(text: Any, tensors: dict[str, tuple[int, ...]]) -> int:
    """What sparse attention's indexers keep of a token."""
    found = ((_INDEX_KEY.fullmatch(name), shape[0]) for name, shape in tensors.items())
    return sum(width for match, width in found if match and int(match[1]) < text.num_hidden_layers)


def _windows(text: Any, tensors: dict[str, tuple[int, ...]]) -> tuple[int | None, ...]:
    """Where every layer is of one of the two common kinds, and all keep the same per token."""
    if recurrent_layers(text, tensors) or getattr(text, "is_heterogeneous", False):
        return ()
    window, longest = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None) or 1 << 30
    kinds = getattr(text, "layer_types", None) or [_SLIDING] * text.num_hidden_layers
    alike = len({shape for name, shape in tensors.items() if _is_kv_projection(name, text.num_hidden_layers)}) <= 1
    if (
        not alike
        or type(window) is not int
        or window >= longest
        or {*kinds} - {_SLIDING, _FULL}
        or _SLIDING not in kinds
    ):
        return ()
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def _is_kv_projection(name: str, layers: int) -> bool:
    """Of a decoder layer: not of a vision tower, nor of the extra layers that predict further tokens."""
    match = _KV_PROJECTION.fullmatch(name)
    return match is not None and int(match[1]) < layers


def _latent_kv_per_token(text: Any, tensors: dict[str, tuple[int, ...]]) -> int | None:
    layers = _attending(text, tensors)
    if not _rank(layers[0]):
        return None
    return sum(_rank(layer) + int(layer.qk_rope_head_dim) for layer in layers) + _index_keys(text, tensors)


def _absorbed_width(text: Any) -> int:
    layers = (layer for layer in _layer_configs(text) if _rank(layer))
    return max((int(x.num_attention_heads * (2 * _rank(x) + x.qk_rope_head_dim)) for x in layers), default=0)


def _key_up_weights(text: Any, tensors: dict[str, tuple[int, ...]]) -> int:
    layers = (layer for layer in _attending(text, tensors) if _rank(layer))
    return sum(int(layer.num_attention_heads * layer.qk_nope_head_dim * _rank(layer)) for layer in layers)


def _attention_width(text: Any) -> int:
    def width(layer: Any) -> int:
        if _rank(layer):
            return _expanded_width(layer)
        heads = layer.num_attention_heads
        key_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        return int(heads * (key_dim + (getattr(layer, "v_head_dim", None) or key_dim)))

    return max(map(width, _layer_configs(text)))

"""A Qwen3-MoE checkpoint without a tokenizer as a GGUF file, for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

_LAYER = {  # of one layer: the name in the checkpoint, the name in GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: Path, path: Path, dtype: str) -> None:
    """Matrices in `dtype` ("bfloat16", as stored, or "float32"); norms and routers in float32, as llama.cpp wants."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensor = _bfloat16_tensors(checkpoint / "model.safetensors")
    writer = GGUFWriter(path, "qwen3moe")
    _write_sizes(writer, config)
    for ours, theirs in _WHOLE.items():
        _add(writer, theirs, tensor(ours), dtype)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for ours, theirs in _LAYER.items():
            _add(writer, f"blk.{layer}.{theirs}", tensor(f"{prefix}.{ours}"), dtype)
        for projection in ("gate", "up", "down"):
            experts = [f"{prefix}.mlp.experts.{e}.{projection}_proj" for e in range(config["num_local_experts"])]
            _add(writer, f"blk.{layer}.ffn_{projection}_exps", np.stack([tensor(name) for name in experts]), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: GGUFWriter, config: dict) -> None:
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _bfloat16_tensors(path: Path) -> Callable[[str], np.ndarray]:
    """A weight's bits by its name without ".weight", as uint16 (numpy has no bfloat16)."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8:start]))

    def tensor(name: str) -> np.ndarray:
        entry = header[f"{name}.weight"]
        begin, end = entry["data_offsets"]
        return np.frombuffer(data[start + begin : start + end], np.uint16).reshape(entry["shape"])

    return tensor


def _add(writer: GGUFWriter, name: str, bits: np.ndarray, dtype: str) -> None:
    if dtype == "float32" or bits.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(f"{name}.weight", (bits.astype(np.uint32) << 16).view(np.float32))
    else:
        writer.add_tensor(f"{name}.weight", bits.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)

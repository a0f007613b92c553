"""Plain checkpoints, rewritten in the formats in which hubs store weights of few bits.

Names and layouts are those of each format's own tools: DeepSeek-V3's fp8, gpt-oss' mxfp4, compressed-tensors'
pack-quantized, AutoAWQ's gemm version and GPTQModel's. Rounding is to nearest with the largest weight of a group at the
end of the range: good enough to compare engines, not what those tools do to keep a model's quality.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Stored = dict[str, torch.Tensor]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight outputs of a word, lowest bits first
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class StoredFormat:
    """How one matrix `[outputs, inputs]` is stored.

    Attributes:
        config: config.json's `quantization_config`.
        store: (the matrix's name without `.weight`, the matrix in float32) -> stored tensors, and what they mean.
    """

    config: dict[str, Any]
    store: Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]


def _blocks_of_128(weight: torch.Tensor, per_block: torch.Tensor) -> torch.Tensor:
    return per_block.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]


def fp8(name: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """e4m3 with a scale per block of 128 x 128."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    scales = padded.view(rows, 128, columns, 128).amax((1, 3)).clamp(min=1e-12) / 448
    codes = (weight / _blocks_of_128(weight, scales)).to(torch.float8_e4m3fn)
    stored = {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
    return stored, codes.float() * _blocks_of_128(weight, scales)


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, group)


def _packed_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of consecutive codes of a row, the first one lowest."""
    fields = codes.view(codes.shape[0], -1, 32 // bits).to(torch.int64)
    return _words(fields, range(0, 32, bits))


def _words(fields: torch.Tensor, shifts: Iterable[int]) -> torch.Tensor:
    word = sum(fields[..., place] << shift for place, shift in enumerate(shifts))
    return torch.as_tensor(word).to(torch.uint32).view(torch.int32)


def packed(bits: int, group: int) -> Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]:
    """compressed-tensors' pack-quantized, symmetric."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        zero = 1 << (bits - 1)
        grouped = _grouped(weight, group)
        scales = (grouped.abs().amax(-1).clamp(min=1e-8) / (zero - 1)).bfloat16()
        codes = (grouped / scales.float()[..., None]).round().clamp(-zero, zero - 1)
        stored = {
            f"{name}.weight_packed": _packed_rows((codes + zero).reshape(weight.shape), bits),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": torch.tensor(weight.shape),
        }
        return stored, (codes * scales.float()[..., None]).reshape(weight.shape)

    return store


def _with_zeros(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[O, I]`, scales and zeros `[O, G]`."""
    grouped = _grouped(weight, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / ((1 << bits) - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, (1 << bits) - 1)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, (1 << bits) - 1)
    return codes.reshape(weight.shape), scales, zeros


def _meaning(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    values = (_grouped(codes, group) - zeros[..., None]) * scales.float()[..., None]
    return values.reshape(codes.shape)


def awq(group: int) -> Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]:
    """AutoAWQ's gemm version: 4 bits, words across outputs."""

    def across(fields_XO: torch.Tensor) -> torch.Tensor:
        fields = fields_XO.to(torch.int64).view(fields_XO.shape[0], -1, 8)
        return _words(fields[..., list(_AWQ_ORDER)], range(0, 32, 4))

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        codes, scales, zeros = _with_zeros(weight, 4, group)
        stored = {
            f"{name}.qweight": across(codes.T.contiguous()),
            f"{name}.qzeros": across(zeros.T.contiguous()),
            f"{name}.scales": scales.T.contiguous(),
        }
        return stored, _meaning(codes, scales, zeros, group)

    return store


def gptq(bits: int, group: int) -> Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]:
    """GPTQ's first version: words down the inputs, zeros stored less one."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        codes, scales, zeros = _with_zeros(weight, bits, group)
        stored = {
            f"{name}.qweight": _packed_rows(codes, bits).T.contiguous(),
            f"{name}.qzeros": _packed_rows(zeros.T.contiguous() - 1, bits),
            f"{name}.scales": scales.T.contiguous(),
            f"{name}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }
        return stored, _meaning(codes, scales, zeros, group)

    return store


def mxfp4(weight_EOI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gpt-oss' blocks `[E, O, G, 16]` and scales `[E, O, G]`."""
    grouped = weight_EOI.unflatten(-1, (-1, 32))
    exponent = (grouped.abs().amax(-1).clamp(min=2.0**-100) / 6).log2().ceil()
    scaled = grouped / exponent.exp2()[..., None]
    distance = (scaled.abs()[..., None] - torch.tensor(_FP4)).abs()
    codes = distance.argmin(-1) | ((scaled < 0).to(torch.int64) << 3)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponent + 127).to(torch.uint8)


def _scheme(bits: int, group: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
            "quantization_status": "compressed", "ignore": ["lm_head"]}  # fmt: skip


def formats(group: int = 128) -> dict[str, StoredFormat]:
    """By name; mxfp4 is not among them: it stores all experts of a layer in one tensor."""
    awq_config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    gptq_config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": False}
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {
        "fp8": StoredFormat(block, fp8),
        "int4": StoredFormat(_scheme(4, group), packed(4, group)),
        "int8": StoredFormat(_scheme(8, group), packed(8, group)),
        "awq": StoredFormat(awq_config, awq(group)),
        "gptq": StoredFormat(gptq_config, gptq(4, group)),
        "gptq8": StoredFormat({**gptq_config, "bits": 8}, gptq(8, group)),
    }


def is_matrix(name: str) -> bool:
    """What quantising tools store in few bits: linear layers but the router and the head."""
    return name.endswith("_proj.weight")


def rewrite(plain: Path, folder: Path, chosen: StoredFormat, meaning: Path | None = None) -> None:
    """`plain`'s checkpoint in another format, file by file; in `meaning`, if given, what it means, in float32."""
    for target in filter(None, (folder, meaning)):
        shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": chosen.config}))
    index = {}
    for file in sorted(plain.glob("*.safetensors")):
        stored, meant = _rewritten(file, chosen)
        index.update(dict.fromkeys(stored, file.name))
        save_file(stored, folder / file.name, {"format": "pt"})
        if meaning is not None:
            save_file(meant, meaning / file.name, {"format": "pt"})
    if len(set(index.values())) > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)


def _rewritten(file: Path, chosen: StoredFormat) -> tuple[Stored, Stored]:
    stored: Stored = {}
    meant: Stored = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            tensor = tensors.get_tensor(name)
            if is_matrix(name):
                parts, value = chosen.store(name.removesuffix(".weight"), tensor.float())
                stored |= {key: part.contiguous() for key, part in parts.items()}
                meant[name] = value.contiguous()
            else:
                stored[name] = tensor
                meant[name] = tensor.float()
    return stored, meant

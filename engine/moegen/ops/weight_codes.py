"""What the codes of `moegen.coding` mean, as torch tensors: expanding them, and making them of plain weights.

A `CodedTensor`'s parts are read as they are stored; in memory they have one form each:
codes as stored, `[..., outputs, row bytes]` uint8 or `[..., words]` int32; scales `[..., groups, outputs]` float32, or
bfloat16 where they are stored in as few bits; zeros the same in int16.

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from functools import cache

import torch

from moegen.coding import WHOLE_INPUTS, Coding

# A value's bits, moved to where float16 has them, are the value over this power of two; subnormals included.
HALF_FACTOR = {"fp8_e4m3": 256.0, "fp4_e2m1": 16384.0}
# Of the eight outputs of an AWQ word, the bit where each begins.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
_FP8_MAX, _INT8_MAX = 448.0, 127.0


def expanded(codes: torch.Tensor, scales_GO: torch.Tensor, zeros_GO: torch.Tensor | None, coding: Coding,
             inputs: int) -> torch.Tensor:  # fmt: skip
    """`[..., O, I]` float32: every element `(code - zero) * scale`, rounded once.

    Args:
        codes: as stored: uint8 rows, or int32 words.
        zeros_GO: None: the coding's own.
    """
    values_OI = _values(codes, coding)[..., :inputs]
    group = min(coding.group_inputs, inputs)
    if zeros_GO is not None:
        values_OI = values_OI - _over_inputs(zeros_GO.float(), group, inputs)
    elif coding.zero:
        values_OI = values_OI - coding.zero
    return values_OI * _over_inputs(scales_GO.float(), group, inputs)


def _over_inputs(of_groups_GO: torch.Tensor, group: int, inputs: int) -> torch.Tensor:
    return of_groups_GO.transpose(-1, -2).repeat_interleave(group, dim=-1)[..., :inputs]


def _values(codes: torch.Tensor, coding: Coding) -> torch.Tensor:
    """`[..., O, I]` float32, before zero and scale."""
    if coding.order == "words down inputs":
        return _fields(codes, tuple(range(0, 32, coding.bits)), coding.bits).permute(-2, -3, -1).flatten(-2).float()
    if coding.order == "words across outputs":
        return _fields(codes, AWQ_SHIFTS, 4).flatten(-2).T.float()
    if coding.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    if coding.kind == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if coding.kind == "fp4_e2m1":
        wide = codes.to(torch.int16)
        half = ((wide & 7) << 9) | ((wide & 8) << 12)
        return half.view(torch.float16).float() * HALF_FACTOR["fp4_e2m1"]
    return (codes.view(torch.int8) if coding.kind == "int8" else codes).float()


def _fields(words: torch.Tensor, shifts: tuple[int, ...], bits: int) -> torch.Tensor:
    """`[..., n]`: the fields of every 32-bit word."""
    return (words[..., None] >> _on(words.device, shifts)).bitwise_and_((1 << bits) - 1)


@cache  # there are zeros for every matrix of every expert of every pass
def _on(device: torch.device, shifts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(shifts, dtype=torch.int32, device=device)


def zeros_of(words: torch.Tensor, coding: Coding) -> torch.Tensor:
    """`[G, O]` int32 of stored zeros `[G, O / n]`: packed along outputs, in AWQ's order or GPTQ's plain one."""
    zeros_GO = _fields(words, zero_shifts(coding), coding.bits).flatten(-2)
    return zeros_GO.add_(coding.zero_shift) if coding.zero_shift else zeros_GO


def zero_shifts(coding: Coding) -> tuple[int, ...]:
    """Of the zeros in a word, in the order of their outputs, the bit where each begins."""
    return AWQ_SHIFTS if coding.order == "words across outputs" else tuple(range(0, 32, coding.bits))


def scales_of(stored: torch.Tensor, coding: Coding, outputs: int) -> torch.Tensor:
    """`[..., G, outputs]` of stored scales: float32, or bfloat16 where nothing is lost.

    Stored are `[..., rows, G]` with a row for `coding.scale_rows` outputs, `[G, O]` beside words, or a single one.
    """
    if coding.order != "rows":
        return stored.float()
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):  # a power of two: its exponent
        # 2 ** -127, which float32 has only as a subnormal, is taken as 0; 255, no number, as NaN.
        bits = stored.view(torch.uint8).to(torch.int32)
        stored = torch.where(bits == 255, torch.nan, (bits << 23).view(torch.float32)).bfloat16()
    if stored.dim() < 2:
        stored = stored.reshape(-1, 1)
    kept = stored if stored.dtype == torch.bfloat16 else stored.float()
    return kept.repeat_interleave(coding.scale_rows, dim=-2)[..., :outputs, :].transpose(-1, -2)


OWN_CODINGS = {
    "int8": Coding("int8", "int8", "rows", WHOLE_INPUTS),
    "fp8": Coding("fp8", "fp8_e4m3", "rows", WHOLE_INPUTS),
}


def quantised(rows_OI: torch.Tensor, coding: Coding) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[O, I]` uint8 and scales `[1, O]` float32 of one of `OWN_CODINGS`: a scale per output, to its largest."""
    rows_OI = rows_OI.float()
    most = _INT8_MAX if coding.kind == "int8" else _FP8_MAX
    scale_O1 = rows_OI.abs().amax(-1, keepdim=True) / most
    over_OI = rows_OI / torch.where(scale_O1 > 0, scale_O1, 1.0)
    codes = over_OI.round().to(torch.int8) if coding.kind == "int8" else over_OI.to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale_O1.T

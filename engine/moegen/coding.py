"""Weights that a checkpoint stores in few bits: which stored tensors make one matrix, and what their bits mean.

Names and layouts are those of the formats' own tools, as transformers reads them: fp8 with block scales
(`quant_method: fp8`), mxfp4, compressed-tensors, AWQ and GPTQ. A matrix is `[outputs, inputs]`; its elements are codes,
and groups of consecutive inputs share a scale, some formats also a zero. The value of an element is
`(code - zero) * scale`.

No weights are read here and no torch is needed.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moegen.errors import CheckpointError, UnsupportedModel

if TYPE_CHECKING:
    from moegen.shape import StoredTensor

Kind = Literal["fp8_e4m3", "fp4_e2m1", "int8", "uint8", "uint4"]
Order = Literal["rows", "words down inputs", "words across outputs"]
WHOLE_INPUTS = 1 << 30  # the group of a scale that serves all inputs of an output
GROUP_MULTIPLE = 32  # of inputs: where the CPU's kernel looks for another scale
_PADDED_OUTPUTS = 32  # in memory they are a multiple: the CPU's kernel knows whole panels
_READABLE = "fp8, mxfp4, compressed-tensors, awq and gptq are read"


@dataclass(frozen=True, slots=True)
class Coding:
    """How the elements of a matrix `[outputs, inputs]` are coded.

    Attributes:
        order: "rows": output after output, codes of consecutive inputs in consecutive bits. "words down inputs"
            (GPTQ): 32-bit words `[inputs / n, outputs]` of n consecutive inputs each. "words across outputs" (AWQ):
            words `[inputs, outputs / 8]`, whose nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on.
        group_inputs: consecutive inputs that share a scale.
        scale_rows: consecutive outputs that share a row of scales.
        zero: the code that means 0; None: stored, one for each scale.
        zero_shift: what is added to stored zeros (GPTQ's first version stores them less one).
    """

    format: str  # for people
    kind: Kind
    order: Order
    group_inputs: int
    scale_rows: int = 1
    zero: int | None = 0
    zero_shift: int = 0

    @property
    def bits(self) -> int:
        return 4 if self.kind in ("fp4_e2m1", "uint4") else 8

    @property
    def scale_bytes(self) -> int:
        """Of a scale in memory: bfloat16 has the powers of two of mxfp4, the others are float32."""
        return 2 if self.format == "mxfp4" else 4

    def groups(self, inputs: int) -> int:
        return -(-inputs // self.group_inputs)

    def memory_bytes(self, outputs: int, inputs: int) -> int:
        """Of a matrix in memory, with its scales and its zeros of two bytes."""
        rows = -(-outputs // _PADDED_OUTPUTS) * _PADDED_OUTPUTS
        for_group = self.scale_bytes + (2 if self.zero is None else 0)
        return rows * (-(-inputs * self.bits // 8) + self.groups(inputs) * for_group)


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A weight matrix, or one per expert, that several stored tensors make."""

    shape: tuple[int, ...]  # ([experts,] outputs, inputs)
    coding: Coding
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    names: tuple[str, ...]  # of codes, scales and zeros in the checkpoint
    transposed: bool = False  # the model's parameter is [..., inputs, outputs]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return tuple(part for part in (self.codes, self.scales, self.zeros) if part is not None)

    @property
    def uri(self) -> str:
        return self.codes.uri

    @property
    def nbytes(self) -> int:
        """As stored."""
        return sum(part.nbytes for part in self.parts)

    @property
    def memory_bytes(self) -> int:
        """Where it stays in its codes."""
        *experts, outputs, inputs = self.shape
        return math.prod(experts) * self.coding.memory_bytes(outputs, inputs)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """As the model has it."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


def logical_tensors(
    stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None
) -> dict[str, StoredTensor | CodedTensor]:
    """The tensors as the model knows them: what makes one matrix is one `CodedTensor` under the matrix's name.

    `quantization` is config.json's `quantization_config`.

    Raises:
        UnsupportedModel: a format that is not read; names it, or the tensor that has it.
        CheckpointError: a part is missing or has another shape; names the tensor and its file.
    """
    if not quantization:
        return dict(stored)
    method = str(quantization.get("quant_method", "unknown"))
    formats: dict[str, Callable[[Mapping[str, StoredTensor], dict[str, Any]], _Format]] = {
        "fp8": _Fp8, "mxfp4": _Mxfp4, "compressed-tensors": _CompressedTensors, "awq": _Awq, "gptq": _Gptq,
    }  # fmt: skip
    if method not in formats:
        raise UnsupportedModel(f"model.uri: weights stored as {method!r} cannot be read; {_READABLE}")
    return formats[method](stored, dict(quantization)).tensors()


class _Format(ABC):
    """One format over one checkpoint's tensors. `codes` names what holds codes; its groups `before` and `after`."""

    method: str
    codes: re.Pattern[str]
    parts: tuple[str, ...]  # endings of what belongs to codes, beside them; the rest is passed through
    ignored: tuple[str, ...] = ("activation_scale", "input_scale", "weight_shape", "input_zero_point")

    def __init__(self, stored: Mapping[str, StoredTensor], settings: dict[str, Any]) -> None:
        self.stored, self.settings = stored, settings
        self.read_settings()

    def read_settings(self) -> None:  # noqa: B027 - a format may need nothing
        """Checks and takes what the format needs of config.json."""

    def is_coded(self, name: str) -> bool:
        return self.codes.fullmatch(name) is not None

    def base(self, name: str) -> str:
        """What the names of all parts begin with."""
        match = self.codes.fullmatch(name)
        assert match is not None
        return match["base"]

    @abstractmethod
    def coded(self, base: str, name: str) -> tuple[str, CodedTensor]:
        """The matrix's own name, and the matrix."""

    def tensors(self) -> dict[str, StoredTensor | CodedTensor]:
        found: dict[str, StoredTensor | CodedTensor] = {}
        used: set[str] = set()
        for name in self.stored:
            if self.is_coded(name):
                logical, tensor = self.coded(self.base(name), name)
                found[logical] = tensor
                used.update(tensor.names)
        for name, stored in self.stored.items():
            if name in used or name.endswith((*self.ignored, "g_idx")):
                continue
            if name.endswith(self.parts):
                raise CheckpointError(
                    f"{name} in {stored.uri} belongs to no weights: those are missing; fetch it again"
                )
            found[name] = stored
        return found

    def part(self, name: str, of: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]) -> StoredTensor:
        """A part of the tensor `of` that must have one of these shapes and dtypes."""
        stored = self.stored.get(name)
        if stored is None:
            raise CheckpointError(f"{name} is missing: {of} in {self.stored[of].uri} cannot be read without it")
        if stored.shape not in shapes:
            raise CheckpointError(
                f"{name} in {stored.uri} is {[*stored.shape]} and not {[*shapes[0]]}, which {of} needs; fetch it again"
            )
        if stored.dtype not in dtypes:
            raise UnsupportedModel(f"{name} in {stored.uri} is stored as {stored.dtype}; {', '.join(dtypes)} are read")
        return stored

    def require_group(self, group: int | None, inputs: int, name: str) -> int:
        """`group`, or all inputs."""
        if group is None or group == -1 or group >= inputs:
            return WHOLE_INPUTS
        if group % GROUP_MULTIPLE:
            uri = self.stored[name].uri
            raise UnsupportedModel(
                f"{name} in {uri} has a scale for {group} inputs; multiples of {GROUP_MULTIPLE} are read"
            )
        return int(group)

    def settings_error(self, setting: str, remedy: str) -> UnsupportedModel:
        value = self.settings.get(setting)
        return UnsupportedModel(
            f"model.uri: {self.method} with quantization_config.{setting} {value!r} cannot be read; {remedy}"
        )


_FLOATS = ("F32", "BF16", "F16")


class _Fp8(_Format):
    """`weight` in e4m3 with `weight_scale_inv`: a scale per block of, usually, 128 x 128, or one for all."""

    method = "fp8"
    codes = re.compile(r"(?P<base>.+)")
    parts = ("_scale_inv",)

    def read_settings(self) -> None:
        block = self.settings.get("weight_block_size")
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise self.settings_error("weight_block_size", "give two numbers")
        self.block = None if block is None else (int(block[0]), int(block[1]))

    def is_coded(self, name: str) -> bool:
        dtype = self.stored[name].dtype
        if dtype == "F8_E5M2":
            raise UnsupportedModel(f"{name} in {self.stored[name].uri} is stored as F8_E5M2; F8_E4M3 is read")
        return dtype == "F8_E4M3" and not name.endswith(self.parts)

    def coded(self, base: str, name: str) -> tuple[str, CodedTensor]:
        stored = self.stored[name]
        if len(stored.shape) not in (2, 3):
            raise UnsupportedModel(f"{name} in {stored.uri} is {[*stored.shape]}; matrices in fp8 are read")
        *experts, outputs, inputs = stored.shape
        rows, group = self.block or (outputs, inputs)
        grid = (*experts, -(-outputs // rows), -(-inputs // group))
        shapes: tuple[tuple[int, ...], ...] = (grid,) if experts or self.block else (grid, (), (1,), (1, 1))
        scale_name = f"{base}_scale_inv"
        scales = self.part(scale_name, name, shapes, (*_FLOATS, "U8", "F8_E8M0"))
        coding = Coding(
            "fp8", "fp8_e4m3", "rows", self.require_group(group, inputs, name), scale_rows=rows
        )  # fmt: skip
        return name, CodedTensor(stored.shape, coding, stored, scales, None, (name, scale_name))


class _Mxfp4(_Format):
    """`*_blocks` of two e2m1 codes per byte, the lower nibble first, with one power of two per 32 in `*_scales`."""

    method = "mxfp4"
    codes = re.compile(r"(?P<base>.+)_blocks")
    parts = ("_scales",)

    def coded(self, base: str, name: str) -> tuple[str, CodedTensor]:
        stored = self.stored[name]
        if stored.dtype != "U8" or len(stored.shape) != 4 or stored.shape[-1] != 16:
            raise UnsupportedModel(
                f"{name} in {stored.uri} is {stored.dtype} {[*stored.shape]}; mxfp4 is read as U8 "
                "[experts, outputs, groups, 16]"
            )
        experts, outputs, groups, _ = stored.shape
        scales = self.part(f"{base}_scales", name, ((experts, outputs, groups),), ("U8",))
        coding = Coding("mxfp4", "fp4_e2m1", "rows", 32)
        shape, names = (experts, outputs, groups * 32), (name, f"{base}_scales")
        return base, CodedTensor(shape, coding, stored, scales, None, names, transposed=True)


class _CompressedTensors(_Format):
    """`weight_packed` (32-bit words of 4- or 8-bit codes along a row), or `weight` in int8 or fp8; `weight_scale`."""

    method = "compressed-tensors"
    codes = re.compile(r"(?P<base>.+)\.(?:weight_packed|weight)")
    parts = (".weight_scale", ".weight_zero_point")

    def read_settings(self) -> None:
        groups = [group for group in (self.settings.get("config_groups") or {}).values() if isinstance(group, dict)]
        weights = [group["weights"] for group in groups if group.get("weights")]
        widths = {(args.get("num_bits"), args.get("type", "int")) for args in weights}
        if not widths or not widths <= {(4, "int"), (8, "int"), (8, "float")}:
            raise self.settings_error("config_groups", "weights of 4 or 8 bits are read")
        sizes = {args.get("group_size") for args in weights if args.get("strategy") == "group"}
        packed = {bits for bits, kind in widths if kind == "int"}
        if len(packed) > 1 or len(sizes) > 1:
            raise self.settings_error("config_groups", "weights of one width and one group size are read")
        if any(args.get("strategy", "channel") not in ("group", "channel", "tensor") for args in weights):
            raise self.settings_error("config_groups", "scales for a group, a channel or a tensor are read")
        if any(args.get("actorder") == "group" for args in weights):
            raise self.settings_error("config_groups", "groups in order of activation (actorder) are not read")
        self.bits = packed.pop() if packed else 8
        self.group_size = sizes.pop() if sizes else None
        self.symmetric = all(args.get("symmetric", True) for args in weights)

    def is_coded(self, name: str) -> bool:
        kept = {"I8", "F8_E4M3"}
        return name.endswith(".weight_packed") or (name.endswith(".weight") and self.stored[name].dtype in kept)

    def coded(self, base: str, name: str) -> tuple[str, CodedTensor]:
        stored = self.stored[name]
        if len(stored.shape) != 2:
            raise UnsupportedModel(f"{name} in {stored.uri} is {[*stored.shape]}; one matrix per tensor is read")
        if f"{base}.weight_g_idx" in self.stored:
            raise UnsupportedModel(f"{base}.weight_g_idx in {stored.uri}: groups in order of activation are not read")
        outputs, width = stored.shape
        inputs, kind, zero = self._codes(name, width)
        scale_name = f"{base}.weight_scale"
        group = self.require_group(self.group_size if kind != "fp8_e4m3" else None, inputs, name)
        wanted = (outputs, -(-inputs // group))
        singles: tuple[tuple[int, ...], ...] = ((outputs,), (), (1,), (1, 1))
        scales = self.part(scale_name, name, (wanted, *(singles if wanted[1] == 1 else ())), _FLOATS)
        rows = 1 if scales.shape and scales.shape[0] == outputs else outputs
        if not self.symmetric and kind != "fp8_e4m3":
            raise self._asymmetric(base, stored)
        coding = Coding(self._format(kind), kind, "rows", group, scale_rows=rows, zero=zero)
        return f"{base}.weight", CodedTensor((outputs, inputs), coding, stored, scales, None, (name, scale_name))

    def _codes(self, name: str, width: int) -> tuple[int, Kind, int]:
        """Inputs, kind and the code of 0."""
        if not name.endswith("_packed"):
            return width, "int8" if self.stored[name].dtype == "I8" else "fp8_e4m3", 0
        if self.stored[name].dtype != "I32":
            raise UnsupportedModel(f"{name} in {self.stored[name].uri} is {self.stored[name].dtype}; I32 is read")
        return width * (32 // self.bits), "uint4" if self.bits == 4 else "uint8", 1 << (self.bits - 1)

    def _format(self, kind: Kind) -> str:
        return {"uint4": "int4", "uint8": "int8", "int8": "int8"}.get(kind, "fp8")

    def _asymmetric(self, base: str, stored: StoredTensor) -> UnsupportedModel:
        return UnsupportedModel(
            f"{base}.weight_zero_point in {stored.uri}: compressed-tensors' asymmetric weights are not read; "
            "symmetric ones are"
        )


class _Words(_Format):
    """`qweight` and `qzeros` in 32-bit words, `scales` of `[groups, outputs]`: AWQ and GPTQ."""

    codes = re.compile(r"(?P<base>.+)\.qweight")
    parts = (".qzeros", ".scales")
    order: Order

    def read_settings(self) -> None:
        self.bits = self.settings.get("bits", 4)
        self.group_size = self.settings.get("group_size", 128)

    @abstractmethod
    def sizes(self, shape: tuple[int, ...], per_word: int) -> tuple[int, int]:
        """Inputs and outputs of `qweight`."""

    def shift(self) -> int:
        return 0

    def coded(self, base: str, name: str) -> tuple[str, CodedTensor]:
        stored, per_word = self.stored[name], 32 // self.bits
        if stored.dtype != "I32" or len(stored.shape) != 2:
            raise UnsupportedModel(
                f"{name} in {stored.uri} is {stored.dtype} {[*stored.shape]}; matrices of I32 are read"
            )
        inputs, outputs = self.sizes(stored.shape, per_word)
        if outputs % per_word:
            raise UnsupportedModel(f"{name} in {stored.uri} has {outputs} outputs; multiples of {per_word} are read")
        group = self.require_group(self.group_size, inputs, name)
        groups = -(-inputs // group)
        scales = self.part(f"{base}.scales", name, ((groups, outputs),), _FLOATS)
        zeros = self.part(f"{base}.qzeros", name, ((groups, outputs // per_word),), ("I32",))
        kind: Kind = "uint4" if self.bits == 4 else "uint8"
        coding = Coding(self.method, kind, self.order, group, zero=None, zero_shift=self.shift())
        names = (name, f"{base}.scales", f"{base}.qzeros")
        return f"{base}.weight", CodedTensor((outputs, inputs), coding, stored, scales, zeros, names)


class _Awq(_Words):
    method = "awq"
    order = "words across outputs"

    def read_settings(self) -> None:
        super().read_settings()
        if self.bits != 4:
            raise self.settings_error("bits", "4 bits are read")
        if str(self.settings.get("version", "gemm")).lower() != "gemm":
            raise self.settings_error("version", "version gemm is read")

    def sizes(self, shape: tuple[int, ...], per_word: int) -> tuple[int, int]:
        return shape[0], shape[1] * per_word


class _Gptq(_Words):
    method = "gptq"
    order = "words down inputs"

    def read_settings(self) -> None:
        super().read_settings()
        if self.bits not in (4, 8):
            raise self.settings_error("bits", "4 and 8 bits are read")
        if self.settings.get("desc_act"):
            raise self.settings_error("desc_act", "groups in order of activation are not read")
        if self.settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
            raise self.settings_error("checkpoint_format", "gptq and gptq_v2 are read")

    def sizes(self, shape: tuple[int, ...], per_word: int) -> tuple[int, int]:
        return shape[0] * per_word, shape[1]

    def shift(self) -> int:
        return int(self.settings.get("checkpoint_format", "gptq") == "gptq")


def coded_tensors(tensors: Mapping[str, StoredTensor | CodedTensor]) -> Iterator[tuple[str, CodedTensor]]:
    """Those that are coded, with their names."""
    return ((name, tensor) for name, tensor in tensors.items() if isinstance(tensor, CodedTensor))

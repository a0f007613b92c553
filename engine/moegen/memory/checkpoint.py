"""A checkpoint on local disk: the model around its experts, and where the experts are stored.

transformers' own loader decides which stored tensors make which parameter: it is run over tensors that are not read
(`moegen.memory.traced`). So names, conversions, shapes, ties and what is missing are its business, for every family
and every way in which hubs store one.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from moegen.coding import CodedTensor, coded_tensors
from moegen.errors import CheckpointError
from moegen.memory.direct_read import READ_BYTES, DirectFiles, ReadBuffer
from moegen.memory.stored_experts import ExpertSource
from moegen.memory.traced import DTYPES, Traced, trace
from moegen.model.host import is_experts
from moegen.model.seams import SEAMS
from moegen.ops.expert_weights import UP
from moegen.ops.weight_codes import expanded, scales_of, zeros_of
from moegen.shape import StoredTensor, model_tensors, read_config
from moegen.storage import local_folder

_EXPERT_NUMBER = re.compile(r"(?P<before>.+\.experts\.)(?P<number>\d+)(?P<after>\..+)")


@contextmanager
def local_checkpoint(model_uri: str) -> Iterator[Path]:
    """The checkpoint's folder on local disk; a remote one is copied aside for as long as it is needed."""
    with local_folder(model_uri, lambda name: name.endswith((".safetensors", ".json"))) as folder:
        yield folder


class Checkpoint:
    """A local checkpoint folder whose files have been found whole. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointError` when a file is missing, damaged or cut short, `UnsupportedModel` by its format."""
        self.folder = folder
        self.config = read_config(str(folder))
        self.tensors = model_tensors(str(folder))
        self.files = DirectFiles()
        self._buffer = ReadBuffer()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.close()

    def load_dense(self, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, dict[str, ExpertSource]]:
        """The model with everything but its experts' matrices, in `dtype` on `device`, and where those are stored.

        The sources are under the names of the experts modules, in the order of the layers; the modules have no
        parameters where their matrices were (biases and norms they have).

        Raises:
            CheckpointError: a tensor is missing, of another shape, has scales that are no numbers, or a file cannot
                be read.
        """
        self._check_scales()
        model = self._traced_model(dtype)
        sources = {name: self._take_experts(module) for name, module in model.named_modules() if is_experts(module)}
        self._realise(model, device)
        return model, sources

    def read(self, stored: StoredTensor | CodedTensor) -> torch.Tensor:
        """One stored tensor, or the values of a coded one. Raises `StorageError` when the disk or the file fails."""
        if isinstance(stored, CodedTensor):
            return self._expanded(stored)
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        for first in range(0, stored.nbytes, READ_BYTES):
            part = data[first : first + READ_BYTES]
            part.copy_(self.files.read(stored.uri, stored.start + first, len(part), self._buffer))
        return data.view(DTYPES[stored.dtype]).view(stored.shape)

    def _expanded(self, coded: CodedTensor) -> torch.Tensor:
        """`coded.shape` float32."""
        coding, (outputs, inputs) = coded.coding, coded.shape[-2:]
        codes = self.read(coded.codes)
        if coding.order == "rows":
            codes = codes.view(*coded.shape[:-2], outputs, -1).view(torch.uint8)
        scales = scales_of(self.read(coded.scales), coding, outputs)
        zeros = None if coded.zeros is None else zeros_of(self.read(coded.zeros), coding)
        return expanded(codes, scales, zeros, coding, inputs)

    def _check_scales(self) -> None:
        """They are few: all are read before anything is made of them."""
        for _, coded in coded_tensors(self.tensors):
            scales = self.read(coded.scales)
            finite = scales != 255 if scales.dtype == torch.uint8 else scales.float().isfinite()
            if not bool(finite.all()):
                number = int((~finite).sum())
                raise CheckpointError(
                    f"{coded.names[1]} in {coded.scales.uri} has {number} scales that are no numbers; fetch it again"
                )

    def _traced_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """transformers' model with the engine's seams, its parameters and buffers `Traced` if they are stored."""
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(copy.deepcopy(self.config)))
        try:
            with _quiet():
                model, report = kind.from_pretrained(
                    None,
                    config=self.config,
                    state_dict={name: trace(stored) for name, stored in self.tensors.items()},
                    dtype=dtype,
                    ignore_mismatched_sizes=True,  # they come back in the report, with their names
                    output_loading_info=True,
                    **SEAMS,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unfit(list(unlike_siblings(self.tensors)) or [str(error)]) from error
        missing = [f"{name} is missing" for name in sorted(report["missing_keys"])]
        wrong = sorted(f"{n} would be {[*stored]} and not {[*own]}" for n, stored, own in report["mismatched_keys"])
        if missing or wrong:
            raise self._unfit([*unlike_siblings(self.tensors), *missing, *wrong])
        return model

    def _unfit(self, reasons: list[str]) -> CheckpointError:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        return CheckpointError(
            f"{self.folder}: the tensors do not make the model of config.json: {'; '.join(reasons[:3])}{more}; "
            "fetch the checkpoint again"
        )

    def _take_experts(self, module: Any) -> ExpertSource:
        weights = [getattr(module, name) for name in (UP[module.has_gate], "down_proj")]
        for name in (UP[module.has_gate], "down_proj"):
            delattr(module, name)
        up_EOI, down_EOI = (weight.transpose(1, 2) if module.is_transposed else weight for weight in weights)
        return ExpertSource.of(up_EOI, down_EOI, self.read)

    def _realise(self, model: nn.Module, device: torch.device) -> None:
        """Reads what is stored, once where parameters are tied, and moves everything to the device."""
        made: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for own in tables:
                for name, tensor in own.items():
                    if tensor is None:
                        continue
                    if tensor not in made:
                        made[tensor] = self._real(tensor, device)
                    own[name] = made[tensor]

    def _real(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        real = tensor.realise(self.read) if isinstance(tensor, Traced) else tensor.detach()
        real = real.to(device)
        return nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real


def unlike_siblings(tensors: Mapping[str, StoredTensor | CodedTensor]) -> Iterator[str]:
    """What is wrong with the experts that are stored one by one: a tensor that only some have, or another shape."""
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for match in filter(None, map(_EXPERT_NUMBER.fullmatch, tensors)):
        layers[match["before"]][int(match["number"])].add(match["after"])
    for before, experts in layers.items():
        for after in sorted(set().union(*experts.values())):
            names = [f"{before}{number}{after}" for number in range(max(experts) + 1)]
            usual = Counter(tensors[name].shape for name in names if name in tensors).most_common(1)[0][0]
            for name in names:
                stored = tensors.get(name)
                if stored is None:
                    yield f"{name} is missing"
                elif stored.shape != usual:
                    yield f"{name} in {stored.uri} is {[*stored.shape]} and not {[*usual]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws no bars and logs no report: what is wrong is raised."""
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

"""Weights in few bits: read as the formats mean them, moved as they are stored, refused where they make no sense.

fp8 and mxfp4 are compared with what transformers makes of the same folder. Its loaders of compressed-tensors, AWQ and
GPTQ need packages that the project does not have: there the folder is compared with transformers' own model of the
weights that the writer (benchmarks/stored_checkpoint.py), which follows the formats' specifications, means by it.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moegen.coding import WHOLE_INPUTS, CodedTensor, Coding
from moegen.errors import CheckpointError, UnsupportedModel
from moegen.memory.checkpoint import Checkpoint
from moegen.memory.direct_read import ReadBuffer
from moegen.memory.weight_home import Arithmetic
from moegen.ops import coded_matrix
from moegen.ops.code_placing import PARTS, SCALE_DTYPES, Run
from moegen.ops.coded_matrix import CodedMatrix
from moegen.ops.expert_kernel import PANEL
from moegen.ops.weight_codes import scales_of
from moegen.plan.explain import explain
from moegen.plan.footprint import Footprint
from moegen.plan.outlook import Outlook
from moegen.plan.search import choose_plan
from moegen.run.certify import logit_difference
from moegen.run.engine import Engine
from moegen.shape import ModelShape, model_tensors
from moegen.spec import Engine as EngineSpec
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from benchmarks.stored_checkpoint import formats, mxfp4, rewrite
from tests.engine.parts import plan
from tests.engine.test_plan import MACHINE
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = {
    "hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08,
}  # fmt: skip
FORMATS = {**formats(64), "mxfp4": None}
FILE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.down_proj"
ROUNDING = 2e-5  # of the largest logit, in float32


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "model", seed=3, **GEOMETRY)


@pytest.fixture(scope="module")
def folders(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path | None]]:
    """By format: the checkpoint, and the plain one that it means where transformers cannot say that."""
    root = tmp_path_factory.mktemp("stored")
    made: dict[str, tuple[Path, Path | None]] = {"mxfp4": (_gpt_oss(root / "mxfp4"), None)}
    for name, chosen in formats(64).items():
        meaning = None if name == "fp8" else root / f"{name}-meaning"
        rewrite(plain, root / name, chosen, meaning)
        made[name] = (root / name, meaning)
    return made


def _gpt_oss(folder: Path) -> Path:
    """As gpt-oss is stored: experts of a layer in one tensor of blocks and one of scales, the rest in bfloat16."""
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=97, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / FILE)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight_EIO = tensors.pop(name).float()
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(weight_EIO.transpose(1, 2))
    save_file(tensors, folder / FILE, {"format": "pt"})
    _edit_config(folder, {"quantization_config": {"quant_method": "mxfp4"}})
    return folder


def _edit_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _reference(name: str, stored: Path, meaning: Path | None) -> PreTrainedModel:
    """transformers' own dequantised model in float32."""
    if meaning is not None:
        return AutoModelForCausalLM.from_pretrained(meaning, dtype=torch.float32)
    config = Mxfp4Config(dequantize=True) if name == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32, quantization_config=config)


STREAMED = {
    "groups": 2, "group_experts": 2, "resident_groups": 1, "stream_slots": 2, "stream_depth": 1, "reader_threads": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantised_model_and_compressed_bytes_move(
    name: str, folders: dict[str, tuple[Path, Path | None]]
) -> None:
    folder, meaning = folders[name]
    reference = _reference(name, folder, meaning).eval()
    with Engine.load(folder, plan(expert_dtype="bfloat16", **STREAMED), staged=True, tokenizer=None) as engine:
        assert logit_difference(engine.host, reference) < ROUNDING
    stored = {key: t for key, t in model_tensors(str(folder)).items() if "experts" in key}
    assert all(isinstance(tensor, CodedTensor) for key, tensor in stored.items() if not key.endswith("bias"))
    half = sum(tensor.nbytes for tensor in stored.values() if isinstance(tensor, CodedTensor)) // 2
    with Checkpoint(folder) as checkpoint:
        sources = checkpoint.load_dense(torch.float32, torch.device("cpu"))[1].values()
        assert all(source.addressable for source in sources)
        assert sum(source.nbytes(2) for source in sources) == half, "half of the experts are half of the bytes"
        parts = [p.rows.nbytes for source in sources for r in source.requests(2, 2) for p in r.parts]
        assert sum(parts) == half, "what is read into a slot is what is stored"
    elements = sum(math.prod(tensor.shape) for tensor in stored.values() if isinstance(tensor, CodedTensor)) // 2
    bits = 4 if name in ("mxfp4", "int4", "awq", "gptq") else 8
    assert elements * bits / 8 < half < elements * (bits / 8 + 0.07)


KINDS = ("fp8_e4m3", "int8", "uint8", "fp4_e2m1", "uint4")
CODINGS = [Coding("rows", kind, "rows", group, zero=0 if kind[0] != "u" else 7)
           for kind in KINDS for group in (32, 64, WHOLE_INPUTS)] + [
    Coding("words", kind, order, group, zero=None)
    for kind, order in (
        ("uint4", "words down inputs"), ("uint8", "words down inputs"), ("uint4", "words across outputs")
    )
    for group in (32, WHOLE_INPUTS)
]  # fmt: skip


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _random(coding: Coding, experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> CodedMatrix:
    """Every code occurs, but for those of fp8 that are no numbers."""
    matrix = CodedMatrix(experts, outputs, inputs, coding, dtype, _zeros)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, matrix.codes.shape, generator=generator, dtype=torch.uint8)
    if coding.kind == "fp8_e4m3":
        codes[codes & 127 == 127] = 0
    matrix.codes.copy_(codes)
    matrix.scales_EGO.copy_(torch.rand(matrix.scales_EGO.shape, generator=generator) + 0.1)
    if matrix.zeros_EGO is not None:
        matrix.zeros_EGO.copy_(torch.randint(0, 256, matrix.zeros_EGO.shape, generator=generator))
    return matrix


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.kind}-{c.order[-6:]}-{c.group_inputs}")
def test_the_kernel_multiplies_with_what_the_codes_mean(coding: Coding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that are no multiple of what the kernel reads at once, counts of no, one and many rows."""
    for outputs, inputs in ((PANEL + 8, 96), (8, 16), (3 * PANEL, 200)):
        matrix = _random(coding, 3, outputs, inputs, torch.float32)
        x = torch.randn(500, inputs)
        tokens = torch.randint(0, 500, (301,))
        counts = [1, 0, 300]
        got = matrix.linear(x, counts, tokens)
        wanted = torch.cat([rows @ matrix.expanded(e).T for e, rows in enumerate(x[tokens].split(counts))])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5 * float(wanted.abs().max()))
        alone = matrix.linear(x, [0, 0, 1], tokens[7:8])
        assert torch.equal(alone[0], got[7]), "a row's result depends on the rows beside it"
        with monkeypatch.context() as patch:  # one thread walks the shares of three, each with its own scratch
            patch.setattr(coded_matrix, "numba_threads", lambda: 3)
            assert torch.equal(matrix.linear(x, counts, tokens), got), "or on the number of threads"


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.kind}-{c.order[-6:]}-{c.group_inputs}")
def test_a_matrix_takes_the_memory_that_plans_count(coding: Coding) -> None:
    """2880 x 2880 are gpt-oss's: its rows in 4 bits are no whole number of cache lines."""
    for outputs, inputs in ((2880, 2880), (512, 704)):
        matrix = CodedMatrix(2, outputs, inputs, coding, torch.float32, _zeros)
        assert matrix.nbytes == 2 * coding.memory_bytes(outputs, inputs)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_placed_at_once_as_they_are_one_by_one(name: str, folders: Any) -> None:
    arithmetic = Arithmetic(torch.device("cpu"), torch.float32)
    with Checkpoint(folders[name][0]) as checkpoint:
        for source in checkpoint.load_dense(torch.float32, torch.device("cpu"))[1].values():
            at_once, one_by_one = (arithmetic.empty_group(source, 2, 2) for _ in range(2))
            for request in source.requests(2, 2):
                request.read_into(at_once, checkpoint.files, ReadBuffer())
                data = checkpoint.files.read(request.file, request.start, request.nbytes, ReadBuffer())
                for part in request.parts:
                    offset = part.rows.start - request.start
                    matrix = one_by_one.up if part.is_up else one_by_one.down
                    part.rows.place(data[offset : offset + part.rows.nbytes], matrix, 2)
            for got, wanted in ((at_once.up, one_by_one.up), (at_once.down, one_by_one.down)):
                assert isinstance(got, CodedMatrix)
                assert isinstance(wanted, CodedMatrix)
                for own, other in zip(got.tensors, wanted.tensors, strict=True):
                    assert other.any()
                    assert torch.equal(own, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_scales_of_every_dtype_are_placed_as_torch_reads_them(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    stored = {
        torch.float32: every.view(torch.bfloat16).float(), torch.float16: every.view(torch.float16),
        torch.bfloat16: every.view(torch.bfloat16), torch.uint8: torch.arange(1, 255, dtype=torch.uint8),
    }[dtype]  # fmt: skip
    stored = stored[stored.float().isfinite()][None].contiguous()
    outputs = stored.shape[1]
    for order in ("words down inputs", "rows"):
        if dtype == torch.uint8 and order != "rows":
            continue
        coding = Coding("any", "uint8", order, WHOLE_INPUTS, zero=None)
        matrix = CodedMatrix(2, outputs, 8, coding, torch.float32, _zeros)
        shape = (1, outputs) if order != "rows" else (outputs, 1)
        data = torch.cat([torch.zeros(1, dtype=torch.uint8), stored.view(-1).view(torch.uint8)])  # not aligned
        matrix.place_runs(data, np.array([Run(PARTS["scales"], 1, 4, 0, outputs, *shape, SCALE_DTYPES[dtype])]), 3)
        wanted = scales_of(stored.view(shape), coding, outputs).float()
        assert torch.equal(matrix.scales_EGO[1, :, :outputs], wanted)
        assert not matrix.scales_EGO[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_means_what_torch_and_the_specification_say(kind: str) -> None:
    coding = Coding("rows", kind, "rows", WHOLE_INPUTS)
    matrix = CodedMatrix(1, 1, 256 * 8 // coding.bits, coding, torch.float32, _zeros)
    codes = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8_e4m3":
        codes[codes & 127 == 127] = 0
    matrix.place_codes(0, 0, codes[None])
    matrix.place_scales(0, 0, torch.ones(1, 1))
    fp4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten()
    meant = {
        "fp8_e4m3": codes.view(torch.float8_e4m3fn).float(), "int8": codes.view(torch.int8).float(),
        "uint8": codes.float(), "fp4_e2m1": fp4[nibbles.long()], "uint4": nibbles.float(),
    }[kind]  # fmt: skip
    assert torch.equal(matrix.linear(torch.eye(matrix.in_features), [matrix.in_features])[:, 0], meant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_no_kernel_widens_them_codes_are_expanded_before_they_are_multiplied(dtype: torch.dtype) -> None:
    matrix = _random(CODINGS[0], 3, 40, 96, dtype)
    x = torch.randn(5, 96, dtype=dtype)
    wanted = torch.cat([x[:2] @ matrix.expanded(0).to(dtype).T, x[2:] @ matrix.expanded(2).to(dtype).T])
    torch.testing.assert_close(matrix.linear(x, [2, 0, 3]), wanted)


# Refused before a row runs ------------------------------------------------------------------------------------------


def _changed(folder: Path, tmp_path: Path, change: Any) -> Path:
    copy = shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(copy / FILE)
    change(tensors)
    save_file(tensors, copy / FILE, {"format": "pt"})
    return copy


BLOCKS = "model.layers.1.mlp.experts.down_proj"
SCALES = {"fp8": f"{EXPERT}.weight_scale_inv", "int4": f"{EXPERT}.weight_scale", "int8": f"{EXPERT}.weight_scale",
          "awq": f"{EXPERT}.scales", "gptq": f"{EXPERT}.scales", "gptq8": f"{EXPERT}.scales",
          "mxfp4": f"{BLOCKS}_scales"}  # fmt: skip
CODES = {"fp8": f"{EXPERT}.weight", "int4": f"{EXPERT}.weight_packed", "int8": f"{EXPERT}.weight_packed",
         "awq": f"{EXPERT}.qweight", "gptq": f"{EXPERT}.qweight", "gptq8": f"{EXPERT}.qweight",
         "mxfp4": f"{BLOCKS}_blocks"}  # fmt: skip


def _load(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        checkpoint.load_dense(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", FORMATS)
def test_scales_that_are_no_numbers_are_refused(name: str, folders: Any, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        scales = tensors[SCALES[name]]
        scales.view(-1)[1 if scales.numel() > 1 else 0] = 255 if scales.dtype == torch.uint8 else torch.nan

    folder = _changed(folders[name][0], tmp_path, spoil)
    with pytest.raises(CheckpointError, match=rf"{SCALES[name]} in .*/{FILE} has 1 scales that are no numbers"):
        _load(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_of_another_shape_are_refused(name: str, folders: Any, tmp_path: Path) -> None:
    folder = _changed(folders[name][0], tmp_path, lambda t: t.update({SCALES[name]: t[SCALES[name]][..., :-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{SCALES[name]} in .*/{FILE} is \[.*\] and not \["):
        _load(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_missing_scales_and_missing_codes_are_named(name: str, folders: Any, tmp_path: Path) -> None:
    folder = _changed(folders[name][0], tmp_path, lambda t: t.pop(SCALES[name]))
    with pytest.raises(CheckpointError, match=rf"{SCALES[name]} is missing: {CODES[name]} in .*/{FILE}"):
        ModelShape.read(str(folder))  # before a job's first row, and before `moegen plan` says anything
    shutil.rmtree(folder)
    folder = _changed(folders[name][0], tmp_path, lambda t: t.pop(CODES[name]))
    with pytest.raises(CheckpointError, match=rf"in .*/{FILE} belongs to no weights"):
        ModelShape.read(str(folder))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "mxfp4"])
def test_a_missing_expert_is_named(name: str, folders: Any, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(EXPERT)]:
            del tensors[key]

    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.weight is missing"):
        _load(_changed(folders[name][0], tmp_path, drop))


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("fp8", {"quant_method": "bitsandbytes"}, "'bitsandbytes' cannot be read; fp8, mxfp4"),
        ("gptq", {"quant_method": "gptq", "bits": 3, "group_size": 64}, "bits 3 cannot be read"),
        ("gptq", {"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act True cannot be read"),
        (
            "gptq",
            {"quant_method": "gptq", "bits": 4, "group_size": 48},
            r"qweight in .*model.safetensors has a scale for 48 inputs",
        ),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "version 'gemv'"),
        ("int4", {"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [64]}, "weight_block_size"),
    ],
)
def test_formats_that_are_not_read_are_refused(
    name: str, config: dict[str, Any], told: str, folders: Any, tmp_path: Path
) -> None:
    folder = _changed(folders[name][0], tmp_path, lambda tensors: None)
    _edit_config(folder, {"quantization_config": config})
    with pytest.raises(UnsupportedModel, match=told):
        ModelShape.read(str(folder))


# Plans --------------------------------------------------------------------------------------------------------------

BUDGET = EngineSpec(host_memory="2GiB")


@pytest.mark.parametrize("name", FORMATS)
def test_a_plan_counts_what_experts_take_in_memory(name: str, folders: dict[str, tuple[Path, Path | None]]) -> None:
    folder = folders[name][0]
    footprint = Footprint(ModelShape.read(str(folder)), "float32", "bfloat16", "bfloat16")
    arithmetic = Arithmetic(torch.device("cpu"), torch.float32)
    with Checkpoint(folder) as checkpoint:
        for source in checkpoint.load_dense(torch.float32, torch.device("cpu"))[1].values():
            taken = arithmetic.empty_group(source, 0, source.experts).nbytes
            assert 0.95 * footprint.expert * source.experts <= taken <= footprint.expert * source.experts


def test_a_plan_counts_what_is_stored_and_what_is_expanded(folders: dict[str, tuple[Path, Path | None]]) -> None:
    shape = ModelShape.read(str(folders["int4"][0]))
    assert (shape.stored_format, shape.expert_weights) == ("int4", 2 * 4 * 3 * 256 * 128)
    chosen = choose_plan(shape, MACHINE, BUDGET)
    footprint = Footprint(shape, chosen.compute_dtype, chosen.expert_dtype, chosen.kv_dtype)
    stored = 3 * (256 * 128 // 2 + 256 * 128 // 64 * 2)
    assert stored <= footprint.expert_stored <= stored + 3 * 16, "codes, scales and shapes"
    assert chosen.compute_dtype == "float32"
    with Engine.load(folders["int4"][0], replace(chosen, threads=1), staged=True, tokenizer=None) as engine:
        supply = next(m.moegen.supply for m in engine.host.model.modules() if hasattr(m, "moegen"))
        (group,) = supply.lend([1] * 4)
        assert group.nbytes <= 4 * footprint.expert
    told = explain(shape, MACHINE, Outlook.of(shape, MACHINE, BUDGET, "auto", None))
    assert "as stored (int4)" in told
    assert "expanded to float32" in told

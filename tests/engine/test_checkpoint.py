from __future__ import annotations

import copy
import json
from pathlib import Path

import fsspec
import pytest
import torch
from moegen.errors import CheckpointError, SpecError, UnsupportedModel
from moegen.memory import read_request, stored_experts, stored_rows
from moegen.memory.checkpoint import Checkpoint, local_checkpoint
from moegen.memory.direct_read import ReadBuffer
from moegen.memory.stored_experts import ExpertSource
from moegen.model.tiny import decoder_layers, layers_of_every_kind, tiny_config
from moegen.ops.expert_weights import UP, ExpertGroup, PlainMatrix
from moegen.run.families import default_config
from moegen.shape import ModelShape, read_config
from moegen.text import Tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, conversion_mapping
from transformers.core_model_loading import Interleave, WeightConverter, WeightRenaming

from benchmarks.families import DOCUMENT
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")
FAMILIES = [  # those that the engine runs, as tests/engine/test_families.py holds the document to be
    line.split("`")[1]
    for line in DOCUMENT.read_text().splitlines()
    if line.startswith("| `") and "| refused |" not in line
]
FILE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint(tmp_path / "model")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under transformers' names: the dense ones loaded, the experts' read piece by piece."""
    with Checkpoint(folder) as checkpoint:
        model, sources = checkpoint.load_dense(torch.float32, CPU)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, source in sources.items():
            module = model.get_submodule(name)
            up, down = read_experts(checkpoint, source)
            tensors[f"{name}.{UP[module.has_gate]}"] = up.transpose(1, 2) if module.is_transposed else up
            tensors[f"{name}.down_proj"] = down.transpose(1, 2) if module.is_transposed else down
    return {name: tensor.detach() for name, tensor in tensors.items()}


def read_experts(checkpoint: Checkpoint, source: ExpertSource) -> tuple[torch.Tensor, torch.Tensor]:
    """`[E, out, in]` of both projections, read in groups of three experts."""
    groups = []
    for first in range(0, source.experts, 3):
        experts = min(3, source.experts - first)
        up, down = (PlainMatrix(torch.empty(experts, p.out_features, p.in_features)) for p in (source.up, source.down))
        up.weight_EOI.fill_(torch.nan)
        down.weight_EOI.fill_(torch.nan)
        groups.append(ExpertGroup(first, up, down))
    if source.addressable:
        for group in groups:
            for request in source.requests(group.first, group.experts):
                request.read_into(group, checkpoint.files, ReadBuffer())
    else:
        source.load_whole(groups)
    return torch.cat([g.up.weight_EOI for g in groups]), torch.cat([g.down.weight_EOI for g in groups])


def pretrained(folder: Path) -> dict[str, torch.Tensor]:
    """The same by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def assert_equal(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert own.keys() == other.keys()
    different = [
        name for name in own if own[name].dtype != other[name].dtype or not torch.equal(own[name], other[name])
    ]
    assert not different


def random_checkpoint(config: PreTrainedConfig, folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        for tensor in (*model.parameters(), *(b for _, b in _persistent_buffers(model))):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(folder)


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def rewrite(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def test_per_expert_and_fused_names_make_the_same_model(folder):
    names = set(load_file(folder / FILE))
    assert EXPERT in names, "the checkpoint is not stored as hubs store it"
    per_expert = load(folder)
    assert_equal(per_expert, pretrained(folder))

    def fuse(tensors):
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.mlp.experts."
            parts = {
                kind: [tensors.pop(f"{prefix}{e}.{kind}_proj.weight") for e in range(4)]
                for kind in ("gate", "up", "down")
            }
            gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
            tensors[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
            tensors[f"{prefix}down_proj"] = torch.stack(parts["down"])

    rewrite(folder, fuse)
    assert_equal(load(folder), per_expert)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    config = default_config(family)
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    random_checkpoint(tiny_config(config, layers_of_every_kind(decoder_layers(full))), tmp_path / "model")
    with Checkpoint(tmp_path / "model") as checkpoint:
        sources = checkpoint.load_dense(torch.float32, CPU)[1]
    assert sources
    assert all(source.addressable for source in sources.values())
    own = load(tmp_path / "model")
    for name in own:
        if family == "zaya" and name.endswith("balancing_biases"):
            own[name][-1] = -1.0  # transformers sets it after loading, whatever is stored
    assert_equal(own, pretrained(tmp_path / "model"))


def test_experts_that_are_converted_are_loaded_whole(folder, monkeypatch):
    rule = WeightConverter("mlp.experts.w13", "mlp.experts.gate_up_proj", [Interleave(dim=1)])
    rename = WeightRenaming("mlp.experts.w2", "mlp.experts.down_proj")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "qwen3_moe", [rule, rename])

    def fuse(tensors):
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.mlp.experts."
            tensors[f"{prefix}w13"], tensors[f"{prefix}w2"] = torch.randn(4, 32, 32), torch.randn(4, 32, 16)
            for name in [name for name in tensors if name.startswith(prefix) and name.endswith(".weight")]:
                del tensors[name]

    rewrite(folder, fuse)
    with Checkpoint(folder) as checkpoint:
        source = checkpoint.load_dense(torch.float32, CPU)[1]["model.layers.1.mlp.experts"]
    assert not source.addressable
    with pytest.raises(ValueError, match="only be loaded whole"):
        source.requests(0, 1)
    assert_equal(load(folder), pretrained(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_keep_their_stored_dtype_and_the_rest_gets_the_one_asked_for(folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    with Checkpoint(folder) as checkpoint:
        model, sources = checkpoint.load_dense(torch.float32, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    source = next(iter(sources.values()))
    assert (source.up.dtype, source.down.dtype) == (dtype, dtype)
    assert source.nbytes(2) == 2 * 3 * 32 * 16 * 2 == sum(r.nbytes for r in source.requests(1, 2))
    assert_equal(load(folder), pretrained(folder))


def test_tensors_at_odd_bytes_are_read(folder):
    """Files of other writers: a header of any length, tensors in any order."""
    file = folder / FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    before = load(folder)
    file.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    assert_equal(load(folder), before)


def test_large_matrices_are_read_in_parts(folder, monkeypatch):
    before = load(folder)
    monkeypatch.setattr(read_request, "READ_BYTES", 64 * 8)
    monkeypatch.setattr(stored_experts, "READ_BYTES", 64 * 8)  # four rows of 32 float32
    monkeypatch.setattr(stored_rows, "_ROWS_TOGETHER", 4)
    with Checkpoint(folder) as checkpoint:
        source = next(iter(checkpoint.load_dense(torch.float32, CPU)[1].values()))
    requests = source.requests(0, 4)
    assert max(r.nbytes for r in requests) <= 64 * 8
    assert sum(r.nbytes for r in requests) == source.nbytes(4)
    assert_equal(load(folder), before)


def test_tied_embeddings_are_one_tensor(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    with Checkpoint(folder) as checkpoint:
        model, _ = checkpoint.load_dense(torch.float32, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equal(load(folder), pretrained(folder))


def test_several_files_make_one_model(folder):
    before = load(folder)
    tensors = load_file(folder / FILE)
    names = sorted(tensors)
    (folder / FILE).unlink()
    for number in range(3):
        save_file({n: tensors[n] for n in names[number::3]}, folder / f"model-{number}.safetensors", {"format": "pt"})
    assert_equal(load(folder), before)


def test_shape_counts_what_the_model_has(folder):
    shape = ModelShape.read(str(folder))
    weights = {name: tensor for name, tensor in load(folder).items() if "inv_freq" not in name}
    assert shape.weights == sum(p.numel() for p in weights.values())
    experts = sum(p.numel() for name, p in weights.items() if ".experts." in name)
    assert shape.expert_weights == experts
    assert shape.kv_per_token == 2 * 2 * (8 + 8)
    assert (shape.experts, shape.experts_per_token, shape.dtype) == (4, 2, "float32")


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj"):
        load(folder)


@pytest.mark.parametrize("gone", [EXPERT, EXPERT.replace("down", "up"), EXPERT.replace(".3.", ".0.")])
def test_a_missing_expert_is_named(folder, gone):
    rewrite(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=rf"{gone} is missing"):
        load(folder)


def test_an_expert_of_another_shape_is_named_with_its_file(folder):
    rewrite(folder, lambda tensors: tensors.update({EXPERT: torch.randn(31, 16)}))
    with pytest.raises(CheckpointError, match=rf"{EXPERT} in .*/{FILE} is \[31, 16\] and not \[32, 16\]"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float8_e4m3fn])
def test_experts_of_unusual_dtypes_are_converted_as_transformers_does(folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    assert_equal(load(folder), pretrained(folder))


def test_a_file_that_the_index_names_must_be_there(folder):
    tensors = load_file(folder / FILE)
    before = load(folder)
    names = sorted(tensors)
    for number in range(3):
        save_file({n: tensors[n] for n in names[number::3]}, folder / f"model-{number}.safetensors", {"format": "pt"})
    (folder / FILE).rename(folder / "consolidated.safetensors")  # another format's copy, not in the index
    index = {"weight_map": {name: f"model-{place % 3}.safetensors" for place, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(load(folder), before)
    assert ModelShape.read(str(folder)).weights == sum(tensor.numel() for tensor in tensors.values())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-1\.safetensors \(1 of 3 files"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    def narrow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    rewrite(folder, narrow)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight|norm"):
        load(folder)


def test_a_truncated_file_is_named_before_anything_loads(folder):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has \d+ bytes where its header promises"):
        ModelShape.read(str(folder))
    with pytest.raises(CheckpointError):
        load(folder)


def test_a_file_that_is_no_safetensors_is_named(folder):
    (folder / FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ModelShape.read(str(folder))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"model_type": "nobody_knows"}, UnsupportedModel, "nobody_knows"),
        ({"hidden_size": "wide"}, CheckpointError, "config.json"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder, change, error, told):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=told):
        read_config(str(folder))


def test_no_checkpoint_no_weights_and_broken_json(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelShape.read(str(tmp_path / "nowhere"))
    (folder / FILE).rename(folder / "model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        ModelShape.read(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelShape.read(str(folder))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "evil"])
def test_code_that_comes_with_a_checkpoint_is_not_run(folder, model_type):
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    kinds = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    for name, change in (
        ("config.json", {"model_type": model_type, "auto_map": kinds, "trust_remote_code": True}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}, "tokenizer_class": "Evil"}),
    ):
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **change}))
    if model_type == "evil":
        with pytest.raises(UnsupportedModel, match="code that comes with a checkpoint is never run"):
            ModelShape.read(str(folder))
        with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
            Tokenizer.load(str(folder))
    else:  # transformers' own code is run instead
        load(folder)
        Tokenizer.load(str(folder))
        (folder / FILE).unlink()
        with pytest.raises(CheckpointError, match=r"no \*\.safetensors files .* other weight formats are not read"):
            load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_checkpoint_behind_a_uri(folder, scheme):
    uri = f"file://{folder}" if scheme == "file" else "memory://models/tiny"
    if scheme == "memory":
        fs = fsspec.filesystem("memory")
        for path in folder.iterdir():
            fs.pipe_file(f"/models/tiny/{path.name}", path.read_bytes())
    assert ModelShape.read(uri) == ModelShape.read(str(folder))
    with local_checkpoint(uri) as local:
        assert_equal(load(local), load(folder))
        assert (local == folder) == (scheme == "file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"shape": [31, 16]},
            r"model\.safetensors: tensor .*3\.down_proj\.weight has 2048 bytes where F32 \[31, 16\] takes",
        ),
        ({"dtype": "F4"}, r"stored as F4"),
        ({"data_offsets": [0]}, r"its safetensors header is damaged"),
        ({"shape": None}, r"its safetensors header is damaged"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(folder, change, told):
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[EXPERT] |= change
    changed = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises((CheckpointError, SpecError), match=told):
        Checkpoint(folder)

from __future__ import annotations

import json

import fsspec
import pytest
import torch
from moegen.errors import CheckpointError, UnsupportedModel
from moegen.memory.checkpoint import load_model, local_checkpoint
from moegen.shape import ModelShape, read_config
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint

FILE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint(tmp_path / "model")


def load(folder):
    return load_model(folder, torch.float32, torch.device("cpu"))


def rewrite(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def test_per_expert_and_fused_names_make_the_same_model(folder):
    names = set(load_file(folder / FILE))
    assert EXPERT in names, "the checkpoint is not stored as hubs store it"
    per_expert = load(folder).state_dict()

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
    fused = load(folder).state_dict()
    assert per_expert.keys() == fused.keys()
    assert all(torch.equal(per_expert[name], fused[name]) for name in fused)


def test_shape_counts_what_the_model_has(folder):
    shape = ModelShape.read(str(folder))
    model = load(folder)
    assert shape.weights == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert shape.expert_weights == experts
    assert shape.kv_per_token == 2 * 2 * (8 + 8)
    assert (shape.experts, shape.experts_per_token, shape.dtype) == (4, 2, "float32")


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj"):
        load(folder)


def test_a_missing_expert_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=r"experts"):
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
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModel, "fp8"),
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


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_checkpoint_behind_a_uri(folder, scheme):
    uri = f"file://{folder}" if scheme == "file" else "memory://models/tiny"
    if scheme == "memory":
        fs = fsspec.filesystem("memory")
        for path in folder.iterdir():
            fs.pipe_file(f"/models/tiny/{path.name}", path.read_bytes())
    assert ModelShape.read(uri) == ModelShape.read(str(folder))
    with local_checkpoint(uri) as local:
        assert torch.equal(load(local).lm_head.weight, load(folder).lm_head.weight)

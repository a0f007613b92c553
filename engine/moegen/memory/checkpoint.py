"""A checkpoint's tensors into a model, by transformers' own loader, and nothing less than all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from moegen.errors import CheckpointError
from moegen.model.seams import SEAMS
from moegen.storage import join, list_names, open_fs, storage_errors


@contextmanager
def local_checkpoint(model_uri: str) -> Iterator[Path]:
    """The checkpoint's folder on local disk; a remote one is copied aside for as long as it is needed."""
    if "://" not in model_uri:
        yield Path(model_uri).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="moegen-checkpoint-") as folder:
        for name in list_names(model_uri):
            if name.endswith((".safetensors", ".json")):
                uri = join(model_uri, name)
                fs, path = open_fs(uri)
                with storage_errors(uri, "read"):
                    fs.get_file(path, str(Path(folder) / name))
        yield Path(folder)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Builds the model on the meta device and fills it from the safetensors files, in `dtype`, on `device`.

    transformers maps the names in which hubs store tensors (per expert or fused) to its own.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or a file cannot be read.
    """
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they come back in the report, with their names
            output_loading_info=True,
            **SEAMS,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if missing or wrong:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}) and {len(wrong)} have "
            f"another shape ({', '.join(wrong[:3]) or 'none'}); the files do not make the model of config.json"
        )
    return model

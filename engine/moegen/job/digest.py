"""A checkpoint's identity without reading all of it."""

from __future__ import annotations

import hashlib
import json

from moegen.shape import config_json, read_header, weight_files
from moegen.storage import describe, open_input

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def model_digest(model_uri: str) -> str:
    """SHA-256 (hex) over config.json and, per safetensors file, its name, size, header and samples of its data.

    The header holds every tensor's name, type, shape and place. The samples (64 blocks of 4 KiB, evenly spread)
    tell a checkpoint from one trained further, which changes nearly every weight; two checkpoints that differ in a
    few tensors only may share a digest: set model.revision to tell those apart.

    Raises:
        CheckpointError: there is no config.json or no safetensors file, or one is cut short.
        StorageError: storage refused.
    """
    files = weight_files(model_uri)
    sha = hashlib.sha256(json.dumps(config_json(model_uri), sort_keys=True).encode())
    for uri in files:
        name = uri.rpartition("/")[2]
        sha.update(f"\0{name}\0".encode() + _file_digest(uri))
    return sha.hexdigest()


def _file_digest(uri: str) -> bytes:
    size = describe(uri).size_bytes
    sha = hashlib.sha256(str(size).encode())
    with open_input(uri, "random") as file:
        header = read_header(uri, size, file)
        sha.update(header)
        data = size - 8 - len(header)
        for place in range(_SAMPLES):
            file.seek(8 + len(header) + max(0, data - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            sha.update(file.read(_SAMPLE_BYTES))
    return sha.digest()

"""A checkpoint's identity without reading all of it."""

from __future__ import annotations

import hashlib
import json

from moegen.errors import CheckpointError, InputError
from moegen.storage import describe, join, list_names, open_input, read_bytes

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit


def model_digest(model_uri: str) -> str:
    """SHA-256 (hex) over config.json and, per safetensors file, its name, size, header and samples of its data.

    The header holds every tensor's name, type, shape and place. The samples (64 blocks of 4 KiB, evenly spread)
    tell a checkpoint from one trained further, which changes nearly every weight; two checkpoints that differ in a
    few tensors only may share a digest: set model.revision to tell those apart.

    Raises:
        CheckpointError: there is no config.json or no safetensors file, or one is cut short.
        StorageError: storage refused.
    """
    names = [name for name in list_names(model_uri) if name.endswith(".safetensors")]
    if not names:
        raise CheckpointError(f"model.uri: no *.safetensors files in {model_uri!r}; give a checkpoint's folder")
    try:
        sha = hashlib.sha256(
            json.dumps(json.loads(read_bytes(join(model_uri, "config.json"))), sort_keys=True).encode()
        )
    except InputError as error:
        raise CheckpointError(f"model.uri: no config.json in {model_uri!r}; give a checkpoint's folder") from error
    except ValueError as error:
        raise CheckpointError(f"model.uri: config.json in {model_uri!r} is not valid JSON: {error}") from error
    for name in names:
        sha.update(f"\0{name}\0".encode() + _file_digest(join(model_uri, name)))
    return sha.hexdigest()


def _file_digest(uri: str) -> bytes:
    size = describe(uri).size_bytes
    sha = hashlib.sha256(str(size).encode())
    with open_input(uri, "random") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_HEADER_LIMIT_BYTES, size - 8):
            raise CheckpointError(f"{uri}: is not a whole safetensors file; download it again")
        sha.update(file.read(length))
        data = size - 8 - length
        for place in range(_SAMPLES):
            file.seek(8 + length + max(0, data - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            sha.update(file.read(_SAMPLE_BYTES))
    return sha.digest()

"""Makes the secrets of this installation, once: each file of /secrets that is not there yet.

Every service reads its own from the volume, so none is in docker-compose.yml, in .env or in an image. To change one,
remove its file, and those that are made of it, and start again.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from pathlib import Path

FOLDER = Path("/secrets")
ENGINE_URL = "http://engine:8765"


def kept(name: str, made: str) -> str:
    """The content of a secret file; `made`, if there was no such file."""
    path = FOLDER / name
    if not path.exists():
        aside = path.with_suffix(".new")
        aside.write_text(made)
        aside.chmod(0o444)  # services run as different users; nobody else mounts this volume
        aside.rename(path)
        print(f"made {path}")
    return path.read_text()


def main() -> None:
    """Independent secrets first, then the files in which services want them."""
    token = kept("moegen_token", secrets.token_urlsafe(32))
    kept("airflow_jwt", secrets.token_urlsafe(48))
    kept("airflow_fernet", base64.urlsafe_b64encode(os.urandom(32)).decode())
    access, secret = kept("s3_access_key", secrets.token_hex(10)), kept("s3_secret_key", secrets.token_urlsafe(30))
    kept("aws_credentials", f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    connection = {"conn_type": "moegen", "host": ENGINE_URL, "password": token}
    kept("connections.json", json.dumps({"moegen_default": connection}))


if __name__ == "__main__":
    main()

"""The service does what its OpenAPI document says, whatever it is asked: schemathesis asks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import Job, Service

EXAMPLES = 12  # per operation and phase
TOKEN = "s3cret"
Start = Callable[..., Service]


@pytest.fixture
def service(start: Start, tmp_path: Path, job_of: Callable[..., Job]) -> Service:
    """With a token, with one job in it, and with no URI allowed to others."""
    (tmp_path / "token").write_text(TOKEN)
    allowed = [f"--allow-{kind}={tmp_path}" for kind in ("input", "output")]
    service = start("--token-file", str(tmp_path / "token"), *allowed)
    service.client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert service.put("known", job_of("out")).status_code == 201
    return service


def test_whatever_is_asked_is_answered_as_the_document_says(service: Service, tmp_path: Path) -> None:
    """Bodies and parameters that fit the document, and ones that do not: no server error, no answer besides those."""
    pytest.importorskip("schemathesis")
    service.wait_end("known")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.client.base_url}/openapi.json"),
        *("--header", f"Authorization: Bearer {TOKEN}", "--max-examples", str(EXAMPLES), "--seed", "1"),
        *("--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color"),
        *(
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    print(run.stdout[-1500:])
    generated = int(re.search(r"(\d+) generated", run.stdout)[1])
    assert generated > 16 * EXAMPLES
    assert "Traceback" not in service.log.read_text()
    assert service.job("known")["state"] == "succeeded"


def test_the_document_names_every_route_and_every_route_wants_the_token(service: Service) -> None:
    document = service.client.get("/openapi.json").raise_for_status().json()
    operations = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert len(operations) == 16
    for method, path in operations:
        url = f"{service.client.base_url}{path.replace('{key}', 'known')}"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Basic é"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            answer = httpx.request(method, url, headers=encoded, content=b"{}")
            assert answer.status_code == (200 if path == "/health" else 401), (method, path, headers)
            assert "known" not in answer.text or path == "/health"
    schemas = document["components"]["schemas"]
    service.client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert schemas["JobView"]["properties"].keys() == service.job("known").keys()
    assert schemas["JobSpec"]["additionalProperties"] is False

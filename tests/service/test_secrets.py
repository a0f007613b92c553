"""Prompts, answers and secrets are in no log, no status and on no page, whatever goes wrong with a row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from moegen.storage import list_names, open_input, put_replace, read_bytes

from tests.service.conftest import Job, Service

PROMPT, PASSWORD, KEY, TOKEN = "PRIVATE-PROMPT", "PRIVATE-PASSWORD", "PRIVATE-SECRET-KEY", "PRIVATE-TOKEN"
PAGES = (
    "/health",
    "/metrics",
    "/openapi.json",
    "/jobs",
    "/v1/jobs",
    "/v1/jobs/job",
    "/v1/jobs/job/logs?tail=10000",
    "/jobs/job",
    "/jobs/job/log",
    "/jobs/job/manifest",
    "/jobs/job/report",
    "/jobs/none",
    "/v1/jobs/none",
)
ROWS = (
    {"messages": [{"role": "user", "content": f"{PROMPT} that can be answered"}]},
    {"messages": [{"role": "user", "content": f"{PROMPT} that is too long " * 99}]},
    {"messages": [{"role": PROMPT, "content": PROMPT}]},
    {"messages": PROMPT},
    {"messages": {PROMPT: PROMPT}},
    {"messages": None},
)


@pytest.fixture
def job(bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """On S3, whose libraries tell all that they do; one row can be answered, the others have all kinds of faults."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("S3FS_LOGGING_LEVEL", "DEBUG")
    lines = [json.dumps(row) for row in ROWS] + [f'{{"messages": "{PROMPT} in a broken line', f'"{PROMPT}"']
    put_replace(f"{bucket}/in.jsonl", "\n".join(lines).encode())
    return {
        "input": {"uri": f"{bucket}/in.jsonl"},
        "prompt": {"messages_column": "messages"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 24, "ignore_eos": True},
        "output": {"uri": f"{bucket}/out"},
        "errors": {"max_error_rate": 1.0},
    }


def private(output: str) -> list[str]:
    """What nobody but a reader of the table may see: the markers, and what was answered."""
    part = next(name for name in list_names(output) if name.startswith("part-"))
    with open_input(f"{output}/{part}", "random") as file:
        rows = pq.read_table(file).to_pylist()
    answered = [row["output_raw"] for row in rows if row["output_raw"]]
    assert [row["status"] for row in rows].count("length") == len(answered) > 0
    return [PROMPT, PASSWORD, KEY, TOKEN, *answered]


def test_nothing_private_is_told(start: Callable[..., Service], job: Job, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/token").write_text(TOKEN)
    service = start("--token-file", str(tmp_path / "secrets/token"))
    service.client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert service.put("job", job).status_code == 201
    refused = [
        service.put("refused", {**job, "input": {"uri": uri}})
        for uri in (
            f"s3://me:{PASSWORD}@bucket/in",
            f"simplecache::https://me:{PASSWORD}@host/in",
            f"s3://{PASSWORD}@b/",
        )
    ]
    assert {answer.status_code for answer in refused} == {422}
    assert service.wait_end("job")["state"] == "succeeded"
    output = job["output"]["uri"]

    told = {path: service.client.get(path).text for path in PAGES}
    told |= {f"refusal {number}": answer.text for number, answer in enumerate(refused)}
    state = [path for path in tmp_path.rglob("*") if path.is_file() and "secrets" not in path.parts]
    told |= {str(path): path.read_text(errors="replace") for path in state}
    names = [name for name in list_names(output) if not name.startswith("part-")]
    told |= {name: read_bytes(f"{output}/{name}").decode(errors="replace") for name in names}
    told |= command_line(job, tmp_path / "secrets")

    assert "CALL: put_object" in told["/v1/jobs/job/logs?tail=10000"]  # the libraries did tell
    assert {"_manifest.json", "_stats.json"} <= told.keys()
    for secret in private(output):
        assert [where for where, text in told.items() if secret in text] == []


def command_line(job: Job, folder: Path) -> dict[str, str]:
    """What a person at a terminal sees, of the job done and of one that names a password."""
    told = {}
    for name, uri in (("run", job["input"]["uri"]), ("password", f"https://me:{PASSWORD}@host/in.csv")):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**job, "input": {"uri": uri}}))
        command = [sys.executable, "-m", "moegen", "run", "--debug", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == (0 if name == "run" else 64), run.stderr
        told[name] = run.stdout + run.stderr
    return told

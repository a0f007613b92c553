"""The compose installation: its files always, the whole of it where there is a Docker daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("engine/Dockerfile", "compose/airflow.Dockerfile")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return load("docker-compose.yml")["services"]


def no_daemon() -> str | None:
    """Why the installation cannot be brought up here; None where it can."""
    if shutil.which("docker") is None:
        return "no docker command"
    for words in (["info"], ["compose", "version"]):
        try:
            done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            return f"docker {words[0]} does not answer"
        if done.returncode:
            return f"docker {words[0]}: {(done.stderr or done.stdout).strip()[:200]}"
    return None


def test_services_wait_for_what_they_need(services):
    once = {name for name, service in services.items() if service["restart"] == "no"}
    assert once == {"secrets", "sample"}
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == ("service_completed_successfully" if other in once else "service_healthy"), name
    assert all(services[name]["restart"] == "unless-stopped" for name in services.keys() - once)


def test_no_secret_is_written_down(services):
    """Whatever is called a secret, a token, a key or a password leads to a file of the volume."""
    texts = [(ROOT / name).read_text() for name in ("docker-compose.yml", "docker-compose.gpu.yml", ".env.example")]
    for line in "\n".join(texts).splitlines():
        if re.search(r"(?i)(token|_key|password|jwt|fernet)\S*\s*[:=]", line.partition("#")[0]):
            assert "/secrets/" in line or "/opt/airflow/state/" in line, line


def test_volumes_are_named_and_ports_are_local(services):
    named = set(load("docker-compose.yml")["volumes"])
    for service in services.values():
        for volume in service["volumes"]:
            assert volume.partition(":")[0] in named or (volume.startswith("./") and volume.endswith(":ro"))
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["engine"]["read_only"]
    assert services["engine"]["cap_drop"] == ["ALL"]


def test_what_is_mounted_is_there(services):
    sources = [volume.partition(":")[0] for service in services.values() for volume in service["volumes"]]
    assert all((ROOT / source).exists() for source in sources if source.startswith("./"))


def test_the_override_for_gpus_changes_services_that_exist(services):
    override = load("docker-compose.gpu.yml")["services"]
    same_image = {name for name, service in services.items() if service["image"] == services["engine"]["image"]}
    assert override.keys() == same_image
    assert {service["image"] for service in override.values()} == {"moegen-engine:gpu"}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_copies_what_is_there_and_reaches_the_daemon_without_a_frontend(name):
    text = (ROOT / name).read_text()
    assert "# syntax=" not in text
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for words in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        if "--from=" not in words:
            for source in [word for word in words.split() if not word.startswith("--")][:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source


def test_settings_of_the_example_are_those_that_are_read():
    read = set(
        re.findall(
            r"\$\{(\w+)", "".join((ROOT / f).read_text() for f in ("docker-compose.yml", "docker-compose.gpu.yml"))
        )
    )
    told = set(re.findall(r"^#? ?([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert told == read


def test_secrets_are_made_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "compose"))
    import make_secrets

    monkeypatch.setattr(make_secrets, "FOLDER", tmp_path)
    make_secrets.main()
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    make_secrets.main()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == made
    assert made["moegen_token"] in made["connections.json"]
    assert made["s3_secret_key"] in made["aws_credentials"]
    assert len({*made.values()}) == len(made) == 7


@pytest.mark.timeout(7200)
def test_up_run_kill_and_down():
    if why := no_daemon():
        pytest.skip(f"no Docker daemon with compose: {why}")
    done = subprocess.run([sys.executable, str(ROOT / "tests/compose/run.py")], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"

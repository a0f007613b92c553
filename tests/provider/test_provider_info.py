from __future__ import annotations

import ast
import importlib
import json
from importlib.metadata import entry_points
from pathlib import Path

import airflow
import jsonschema
from airflow.providers_manager import ProvidersManager
from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

import moegen_airflow
from moegen_airflow.decorator import moegen_task
from moegen_airflow.get_provider_info import get_provider_info

PACKAGE = Path(moegen_airflow.__file__).parent


def test_valid_against_airflows_schema():
    schema = Path(airflow.__file__).parent / "provider_info.schema.json"
    jsonschema.validate(get_provider_info(), json.loads(schema.read_text()))


def test_the_entry_point_is_installed():
    (point,) = [p for p in entry_points(group="apache_airflow_provider") if p.value.startswith("moegen_airflow")]
    assert point.load() is get_provider_info


def test_every_module_and_class_named_exists():
    info = get_provider_info()
    for kind in ("hooks", "operators", "sensors", "triggers"):
        for entry in info[kind]:
            for module in entry["python-modules"]:
                importlib.import_module(module)
    decorators = [decorator["class-name"] for decorator in info["task-decorators"]]
    for path in [*info["extra-links"], *decorators, info["connection-types"][0]["hook-class-name"]]:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_airflow_knows_the_connection_type():
    manager = ProvidersManager()
    form = {name for name in manager.connection_form_widgets if name.startswith("extra__moegen__")}
    assert form == {f"extra__moegen__{f}" for f in ("default_model", "verify_ssl", "ca_cert", "request_timeout")}
    assert manager.field_behaviours["moegen"]["relabeling"]["password"] == "Token"
    assert manager.providers["moegen-airflow"].data["name"] == "moegen"
    assert "moegen_airflow.link.MoegenJobLink" in manager.extra_links_class_names


def test_tasks_know_hook_and_decorator():
    manager = ProvidersManagerTaskRuntime()
    assert manager.hooks["moegen"].hook_class_name == "moegen_airflow.hook.MoegenHook"
    assert manager.taskflow_decorators["moegen"] is moegen_task


def test_the_provider_imports_neither_torch_nor_the_engine():
    for source in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "moegen", "transformers", "pyarrow"}, source

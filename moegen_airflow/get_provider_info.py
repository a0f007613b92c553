"""What Airflow reads at start, without importing a hook: the connection form and where the classes are."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """The provider's description, as `airflow/provider_info.schema.json` wants it."""
    return {
        "package-name": "moegen-airflow",
        "name": "moegen",
        "description": "Prompt tables through large Mixture-of-Experts models, by a moegen job service.",
        "integrations": [{"integration-name": "moegen", "tags": ["service"]}],
        "hooks": [{"integration-name": "moegen", "python-modules": ["moegen_airflow.hook"]}],
        "operators": [{"integration-name": "moegen", "python-modules": ["moegen_airflow.operator"]}],
        "sensors": [{"integration-name": "moegen", "python-modules": ["moegen_airflow.sensor"]}],
        "triggers": [{"integration-name": "moegen", "python-modules": ["moegen_airflow.trigger"]}],
        "task-decorators": [{"name": "moegen", "class-name": "moegen_airflow.decorator.moegen_task"}],
        "extra-links": ["moegen_airflow.link.MoegenJobLink"],
        "connection-types": [_CONNECTION_TYPE],
    }


_CONNECTION_TYPE = {
    "connection-type": "moegen",
    "hook-class-name": "moegen_airflow.hook.MoegenHook",
    "hook-name": "moegen",
    "ui-field-behaviour": {
        "hidden-fields": ["login", "extra"],
        "relabeling": {"host": "Service URL", "password": "Token", "schema": "Scheme"},
        "placeholders": {
            "host": "http://moegen:8080, or a host name with scheme and port below",
            "schema": "http or https; not needed with a URL",
            "port": "not needed with a URL",
            "password": "the service's bearer token; empty when it asks for none",
        },
    },
    "conn-fields": {
        "default_model": {
            "label": "Default model",
            "description": "Checkpoint folder or URI for operators that name no model_id",
            "schema": {"type": ["string", "null"]},
        },
        "verify_ssl": {
            "label": "Verify TLS certificate",
            "schema": {"type": ["boolean", "null"], "default": True},
        },
        "ca_cert": {
            "label": "CA certificate file",
            "description": "Path of a PEM file on the workers and the triggerer, for a private authority",
            "schema": {"type": ["string", "null"]},
        },
        "request_timeout": {
            "label": "Request timeout (seconds)",
            "schema": {"type": ["number", "null"], "default": 30},
        },
    },
}

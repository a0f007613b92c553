"""What the asset events of a task that ran a job say of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset

if TYPE_CHECKING:
    from airflow.sdk import Context


def event_extra(manifest: Mapping[str, Any], model_uri: str, output_uri: str) -> dict[str, Any]:
    """What a consumer wants to know before it opens the table; the manifest has the rest."""
    names = ("job_key", "rows", "statuses", "prompt_tokens", "completion_tokens", "rows_per_s", "tokens_per_s")
    return {
        **{name: manifest.get(name) for name in names},
        "model": model_uri,
        "output_uri": output_uri,
        "manifest_uri": f"{output_uri.rstrip('/')}/_manifest.json",
    }


def describe(context: Context, outlets: Iterable[object], extra: dict[str, Any]) -> None:
    """Sets the `extra` of the event of every asset among the outlets."""
    events: Any = context.get("outlet_events")
    if events is None:
        return
    for outlet in outlets:
        if isinstance(outlet, Asset):
            events[outlet].extra = extra

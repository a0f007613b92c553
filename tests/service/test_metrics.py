"""`/metrics` while a real job runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import Job, Service, wait_for

Samples = dict[tuple[str, str], float]


def scraped(service: Service) -> Samples:
    """(name, label value) -> sample; label "" where there is none."""
    families = text_string_to_metric_families(service.client.get("/metrics").text)
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in families
        for sample in family.samples
    }


def test_live_figures_of_the_running_job(
    start: Callable[..., Service], job_of: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a machine that was never measured
    service = start()
    idle = scraped(service)
    assert idle["moegen_queue_length", ""] == 0
    assert not any(name == "moegen_running" for name, _ in idle)

    service.put("job", job_of("out", rows=400, slow=True))
    service.put("next", job_of("next"))
    seen = wait_for(lambda: now if (now := scraped(service)).get(("moegen_passes", ""), 0) > 10 else None, "passes")
    assert seen["moegen_queue_length", ""] == 1
    assert seen["moegen_jobs", "running"] == 1
    assert seen["moegen_running", ""] > 0
    assert seen["moegen_tokens_per_s", ""] > 0
    assert seen["moegen_bytes_streamed", "disk"] == 0
    assert seen["moegen_starved_s", ""] == 0
    assert not any(name in ("moegen_s_mfu", "moegen_s_mbu", "moegen_overlap") for name, _ in seen)  # null, never 0

    engine = service.job("job")["progress"]["engine"]
    assert engine["passes"] > 10
    assert engine["s_mfu"] is None
    for key in ("next", "job"):
        service.client.delete(f"/v1/jobs/{key}").raise_for_status()
    wait_for(lambda: not service.runners(), "the runner's end")
    assert not any(name == "moegen_running" for name, _ in scraped(service))

"""The pages under /jobs, from the real service."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.html_page import HtmlPage
from tests.service.conftest import Job, Service, wait_for

Start = Callable[..., Service]
JobOf = Callable[..., Job]

SECTIONS = ["Progress", "Throughput", "Rows", "Job", "Plan", "Log"]
NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}</title></pre>"
ROWS = 400  # of a slow job
SECRET = "Tell nobody about"  # in every prompt


def page_of(service: Service, path: str, status: int = 200) -> HtmlPage:
    response = service.client.get(path)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return HtmlPage(response.text)


def words(page: HtmlPage) -> str:
    return " ".join(page.text.split())


def under_way(job: Job) -> bool:
    return bool((job["progress"] or {}).get("rows_committed"))


def table_with_trouble(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": f"{SECRET} {row}"} for row in range(20)]
    rows[3]["prompt"] = None
    rows[4]["prompt"] = ""
    rows[5]["prompt"] = rows[6]["prompt"] = {"not": SECRET}
    rows[7]["prompt"] = SECRET * 100
    lines = [json.dumps(row) for row in rows]
    lines[8] = f'{{"prompt": "{SECRET}'
    (folder / "trouble.jsonl").write_text("\n".join(lines))
    return folder / "trouble.jsonl"


def test_a_job_that_succeeded(start: Start, job_of: JobOf, tmp_path: Path) -> None:
    service = start()
    spec = job_of("out", max_tokens=4)
    trouble = {"input": {"uri": str(table_with_trouble(tmp_path))}, "errors": {"max_error_rate": 1}}
    service.put("trouble", {**spec, **trouble})
    job = service.wait_end("trouble")
    assert job["state"] == "succeeded"

    page = page_of(service, "/jobs/trouble")
    assert page.headings == SECTIONS
    assert page.title == "succeeded: out - moegen"
    assert (page.refresh_s, page.elements.count("progress"), page.elements.count("svg")) == (None, 1, 2)
    said = words(page)
    assert "20 of 20 rows (100.0 %)" in said
    for status, count in job["progress"]["statuses"].items():
        assert f"{status} {count} {100 * count / 20:.2f} %" in said
    for code, count in {"bad_prompt_type": 2, "empty_prompt": 1, "malformed_json": 1, "too_long": 1}.items():
        assert f"{code} {count} {100 * count / 20:.2f} %" in said
    assert SECRET not in said
    assert f"{job['manifest']['completion_tokens']:,} tokens were generated" in said
    assert "page tokens" in said  # of the plan
    assert "--- attempt 1" in said  # of the log
    assert str(tmp_path / "out") in said

    assert page.links == ["../jobs", "trouble/log", "trouble/report", "trouble/manifest"]
    log, report, manifest = (service.client.get(f"/jobs/{link}") for link in page.links[1:])
    assert log.headers["content-type"] == "text/plain; charset=utf-8"
    assert log.text == service.client.get("/v1/jobs/trouble/logs").text
    assert "Expert heat map" in HtmlPage(report.text).headings
    assert manifest.json() == job["manifest"]

    listed = page_of(service, "/jobs")
    assert listed.headings == ["Queue", "History"]
    assert "jobs/trouble" in listed.links
    assert listed.refresh_s is None
    assert "No job runs or waits." in words(listed)
    assert "20 of 20 rows (100.0 %)" in words(listed)
    assert service.job("trouble") == job  # the endpoints say what they said: no page's figures among it
    assert "detail" not in json.dumps(job)


def test_an_empty_service(start: Start) -> None:
    service = start()
    said = words(page_of(service, "/jobs"))
    assert service.client.get("/jobs/", follow_redirects=True).url.path == "/jobs"
    assert "No job runs or waits." in said
    assert "No job has ended." in said


def test_names_that_html_would_trip_over(start: Start, job_of: JobOf, tmp_path: Path, model: Path) -> None:
    service = start()
    (tmp_path / "models").mkdir()
    hostile_model = tmp_path / "models" / NASTY.replace("/", "\\")
    hostile_model.symlink_to(model)
    base = {**job_of("out"), "model": {"uri": str(hostile_model)}, "job": {"name": NASTY}}
    service.put("fails", {**base, "prompt": {"column": NASTY}})
    service.put("runs", {**base, "output": {"uri": str(tmp_path / f"out {NASTY}")}})
    failed, succeeded = service.wait_end("fails"), service.wait_end("runs")
    assert (failed["state"], succeeded["state"]) == ("failed", "succeeded")
    assert "<script>alert(1)</script><img" in failed["error"]

    for path in ("/jobs", "/jobs/fails", "/jobs/runs", "/jobs/runs/report"):
        page = page_of(service, path)  # nothing runs, nothing is fetched, all is closed: see `HtmlPage`
        assert not {"script", "img", "iframe", "link", "form", "object"} & {*page.elements}, path
        assert NASTY in page.text or hostile_model.name in page.text, path
        assert "49" not in page.title
    assert page_of(service, "/jobs/fails").title == f"failed: {NASTY} - moegen"


def test_a_job_that_failed(start: Start, job_of: JobOf) -> None:
    service = start()
    service.put("job", {**job_of("out"), "prompt": {"column": "promt"}})
    service.wait_end("job")
    page = page_of(service, "/jobs/job")
    assert page.headings == SECTIONS
    said = words(page)
    assert said.count("did you mean 'prompt'") == 2  # the error, and the log
    assert "exit code 64" in said
    for nothing in ("not counted ", "No row has run.", "No row is done."):
        assert nothing in said
    assert page.refresh_s is None
    assert "failed" in words(page_of(service, "/jobs"))
    for missing in ("manifest", "report"):
        page_of(service, f"/jobs/job/{missing}", 404)


def test_jobs_that_run_and_wait(start: Start, job_of: JobOf) -> None:
    service = start()
    service.put("ended", {**job_of("ended"), "prompt": {"column": "promt"}})
    service.wait_end("ended")
    service.put("runs", job_of("runs", rows=ROWS, slow=True))
    service.put("zulu", job_of("zulu"))
    service.put("alpha", job_of("alpha"))
    service.wait("runs", under_way)

    page = page_of(service, "/jobs/runs")
    assert (page.refresh_s, page.elements.count("svg")) == (5, 2)
    said = words(page)
    assert re.search(r"running started .* ago", said)
    assert f"of {ROWS} rows (" in said
    assert page.title == "running: runs - moegen"
    assert page_of(service, "/jobs/runs?refresh=30").refresh_s == 30
    still = page_of(service, "/jobs/runs?refresh=0")
    assert (still.refresh_s, "?refresh=5" in still.links) == (None, True)

    waits = page_of(service, "/jobs/alpha")
    assert waits.headings == SECTIONS
    assert (waits.refresh_s, waits.links[:2]) == (5, ["../jobs", "?refresh=0"])
    for nothing in (
        "queued number 2 in the queue",
        "not counted yet",
        "No row has run.",
        "No plan has been made.",
        "Nothing has been",
    ):
        assert nothing in words(waits)
    assert "next to run" in words(page_of(service, "/jobs/zulu"))

    listed = page_of(service, "/jobs")
    assert listed.refresh_s == 5
    assert [link for link in listed.links if link.startswith("jobs/")] == [
        f"jobs/{key}" for key in ("runs", "zulu", "alpha", "ended")
    ]
    assert page_of(service, "/jobs?page=2&refresh=0").links[-1] == "?page=1"
    for wrong in ("/jobs?page=0", "/jobs?refresh=-1", "/jobs/runs?refresh=often"):
        assert service.client.get(wrong).status_code == 422


def course_of(page: HtmlPage) -> tuple[int, int]:
    """Rows and tokens over all attempts."""
    found = re.search(r"([\d,]+) rows ended, ([\d,]+) tokens were generated", words(page))
    assert found is not None, words(page)
    rows, tokens = (int(count.replace(",", "")) for count in found.groups())
    return rows, tokens


def test_throughput_outlives_the_service(start: Start, job_of: JobOf) -> None:
    service = start()
    service.put("job", job_of("out", rows=ROWS, slow=True))
    service.wait("job", lambda job: under_way(job) and job["progress"]["rows_done"] >= 40)
    rows, tokens = course_of(page_of(service, "/jobs/job"))
    assert (rows >= 30, tokens >= 30 * 24) == (True, True)
    service.end(signal.SIGKILL)
    wait_for(lambda: not service.runners(), "the runner's end")

    service.start()
    page = page_of(service, "/jobs/job")  # before or after the second attempt's first pass
    assert page.elements.count("svg") == 2
    assert [was <= now for was, now in zip((rows, tokens), course_of(page), strict=True)] == [True, True]
    service.wait("job", lambda job: job["attempts"] == 2 and job["progress"]["rows_done"] > 150)
    both = page_of(service, "/jobs/job")
    assert "in all attempts, one after the other" in words(both)
    assert course_of(both)[0] > rows
    service.client.delete("/v1/jobs/job").raise_for_status()
    assert "cancelled" in page_of(service, "/jobs/job").title


@pytest.mark.parametrize(
    "key", ["none", "<script>alert(1)</script>", "a/b", "..%2f", "manifest", "x" * 5000, "%00", "é"]
)
@pytest.mark.parametrize("below", ["", "/log", "/manifest", "/report"])
def test_what_is_not_there_is_a_page(one_service: Service, key: str, below: str) -> None:
    path = f"/jobs/{quote(key, safe='%')}{below}"
    page = page_of(one_service, path, 404)
    assert "This service knows no job" in page.text
    assert "script" not in page.elements
    home = httpx.URL(one_service.client.base_url).join(path).join(page.links[0])
    assert home.path == "/jobs"


@pytest.fixture(scope="module")
def one_service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a token, which its client bears, and without a job."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "token").write_text("s3cret\n")
    service = Service(folder, "--token-file", str(folder / "token"))
    service.start()
    service.client.headers["Authorization"] = "Bearer s3cret"
    yield service
    service.end()
    service.client.close()


PAGES = ("/jobs", "/jobs/none", "/jobs/none/log", "/jobs/none/manifest", "/jobs/none/report")


def test_the_token_is_the_password(one_service: Service) -> None:
    url = one_service.client.base_url
    for path in PAGES:
        for auth in (None, ("me", "wrong"), ("s3cret", ""), ("", "s3cret "), ("s3cret", "s3cret:")):
            response = httpx.get(url.join(path), auth=auth)
            assert response.status_code == 401, (path, auth)
            assert response.headers["www-authenticate"] == 'Basic realm="moegen", charset="UTF-8"'
        for header in ("Basic", "Basic s3cret", "Basic !!!", "Basic /w==", "s3cret", "Bearer", "Digest s3cret"):
            assert httpx.get(url.join(path), headers={"Authorization": header}).status_code == 401, (path, header)
        for auth in (("me", "s3cret"), ("", "s3cret")):
            assert httpx.get(url.join(path), auth=auth).status_code == (200 if path == "/jobs" else 404)
        assert one_service.client.get(path).status_code == (200 if path == "/jobs" else 404)


def test_a_password_opens_no_endpoint(one_service: Service) -> None:
    url = one_service.client.base_url
    for method, path in (("GET", "/v1/jobs"), ("PUT", "/v1/jobs/a"), ("DELETE", "/v1/jobs/a"), ("GET", "/metrics")):
        response = httpx.request(method, url.join(path), auth=("me", "s3cret"))
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"


def test_what_browsers_are_told(one_service: Service) -> None:
    for path in PAGES:
        headers = one_service.client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    html = one_service.client.get("/jobs").text
    assert not re.search(r"https?:|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert '<html lang="en">' in html

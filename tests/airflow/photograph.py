"""Photographs for the documentation: `python tests/airflow/photograph.py` writes docs/images/*.png.

Needs playwright and a Chromium (`CHROMIUM`, default /usr/bin/chromium). Starts its own Airflow and job service.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.airflow.stage import build_stage  # noqa: E402
from tests.airflow.standalone import Standalone  # noqa: E402
from tests.provider.real_service import RealService, wait_until  # noqa: E402

IMAGES = HERE.parents[1] / "docs" / "images"
DAG = "moegen_table"
ROWS = 3000  # a run of a minute
SIZE = {"width": 1280, "height": 800}


def job_page(page: Page, url: str) -> None:
    """While the job runs."""
    page.goto(f"{url}?refresh=0")
    page.get_by_text("rows/s").first.wait_for()


def report(page: Page, url: str) -> None:
    page.goto(f"{url}/report")


def dag_graph(page: Page, url: str, run_id: str) -> None:
    page.goto(f"{url}/dags/{DAG}/runs/{quote(run_id)}")
    page.get_by_role("button", name="Show Graph").click()
    page.locator(".react-flow__node").nth(2).wait_for()


def task_details(page: Page, url: str, run_id: str) -> None:
    page.goto(f"{url}/dags/{DAG}/runs/{quote(run_id)}/tasks/wait/details")
    page.get_by_text("moegen job").first.wait_for()


def connection_form(page: Page, url: str, run_id: str) -> None:
    page.goto(f"{url}/connections")
    page.get_by_role("button", name="Add Connection").click()
    page.get_by_role("dialog").get_by_role("combobox").first.click()
    page.keyboard.type("moegen")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Extra Fields", exact=True).click()
    page.get_by_text("Default model").wait_for()


def half_done(service: RealService) -> str | None:
    """The running job's key."""
    for job in service.jobs():
        progress = job["progress"] or {}
        if job["state"] == "running" and progress.get("rows_done", 0) > 0.4 * progress.get("rows_total", 0) > 0:
            return job["key"]
    return None


def photograph(airflow: Standalone, service: RealService, conf: dict[str, str], images: Path) -> None:
    """One file per page, named after the function that opens it; the job's own page while it runs."""
    with sync_playwright() as browsers:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = browsers.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)

        def take(open_page: Callable[..., None], *where: str) -> None:
            open_page(page, *where)
            page.wait_for_timeout(3000)  # the graph's layout and the fonts
            page.screenshot(path=images / f"{open_page.__name__}.png")

        run_id = airflow.trigger(DAG, **conf, max_tokens=120)
        job = f"{service.url}/jobs/{wait_until(lambda: half_done(service), 'the job is half done', 300)}"
        take(job_page, job)
        airflow.end(DAG, run_id)
        take(report, job)
        for open_page in (dag_graph, task_details, connection_form):
            take(open_page, airflow.url, run_id)
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stage = build_stage(folder)
        with RealService(folder / "service") as service:
            environment = {"AIRFLOW_CONN_MOEGEN_DEFAULT": service.connection_uri, "MOEGEN_DEMO_DIR": str(folder)}
            with Standalone(folder / "home", stage.dags, **environment) as airflow:
                photograph(airflow, service, stage.conf(stage.table("many", rows=ROWS), "many"), IMAGES)


if __name__ == "__main__":
    main()

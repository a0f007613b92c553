"""Photographs for the documentation: `python tests/airflow/photograph.py` writes docs/images/*.png.

Needs playwright and a Chromium (`CHROMIUM`, default /usr/bin/chromium). Starts its own Airflow and job service.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.airflow.stage import build_stage  # noqa: E402
from tests.airflow.standalone import Standalone  # noqa: E402
from tests.provider.real_service import RealService  # noqa: E402

IMAGES = HERE.parents[1] / "docs" / "images"
DAG = "moegen_table"
SIZE = {"width": 1280, "height": 800}


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


def photograph(airflow: Standalone, run_id: str, images: Path) -> None:
    """One file per page, named after the function that opens it."""
    with sync_playwright() as browsers:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = browsers.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        for open_page in (dag_graph, task_details, connection_form):
            open_page(page, airflow.url, run_id)
            page.wait_for_timeout(3000)  # the graph's layout and the fonts
            page.screenshot(path=images / f"{open_page.__name__}.png")
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stage = build_stage(folder)
        with RealService(folder / "service") as service:
            environment = {"AIRFLOW_CONN_MOEGEN_DEFAULT": service.connection_uri, "MOEGEN_DEMO_DIR": str(folder)}
            with Standalone(folder / "home", stage.dags, **environment) as airflow:
                photograph(airflow, airflow.run(DAG), IMAGES)


if __name__ == "__main__":
    main()

"""The floors: no import goes upwards, doors and planning need no torch, the two parts never meet."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import moegen
import pytest

import moegen_airflow

ENGINE, PROVIDER = Path(moegen.__file__).parent, Path(moegen_airflow.__file__).parent
FLOORS = {
    0: ("condition", "cores", "errors", "units", "spec", "spec_text", "row"),
    1: ("answer", "coding", "shape", "state_shape", "plan", "remote", "schedule", "storage", "table", "text"),
    2: ("ops",),
    3: ("model", "memory"),
    4: ("run",),
    5: ("job",),
    6: ("cli", "service", "display", "openapi", "report", "pages", "__main__"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
TORCH_FREE = (
    "cli", "service", "display", "pages.routes", "text", "shape", "storage", "plan.machine", "plan.search",
    "plan.explain", "schedule.scheduler", "table.reader", "table.writer", "table.inspect", "job.worker",
    "job.records", "job.runner",
)  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions, but for those that only type checkers see."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def test_every_room_has_a_floor():
    rooms = {path.relative_to(ENGINE).parts[0].removesuffix(".py") for path in modules(ENGINE)} - {"__init__"}
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize("path", modules(ENGINE), ids=lambda path: str(path.relative_to(ENGINE)))
def test_no_import_goes_upwards(path):
    own = FLOOR_OF.get(path.relative_to(ENGINE).parts[0].removesuffix(".py"), 0)
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "moegen" and rest and rest[0] in FLOOR_OF:
            assert FLOOR_OF[rest[0]] <= own, f"floor {own} imports {name} of floor {FLOOR_OF[rest[0]]}"


def test_the_two_parts_share_nothing():
    for path in modules(ENGINE):
        assert not {"airflow", "moegen_airflow"} & {name.split(".")[0] for name in imports(path)}, path
    for path in modules(PROVIDER):
        assert not {"moegen", "torch", "transformers", "pyarrow"} & {name.split(".")[0] for name in imports(path)}, path


def test_there_is_no_package_called_engine():
    assert not (ENGINE.parent / "__init__.py").exists()


def run_blocked(blocked: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in blocked)
    return subprocess.run([sys.executable, "-c", f"import sys; {block}; {code}"], capture_output=True, text=True)


def test_doors_planner_scheduler_and_table_import_without_torch():
    names = ", ".join(f"moegen.{name}" for name in TORCH_FREE)
    done = run_blocked(("torch", "numba", "airflow"), f"import {names}")
    assert done.returncode == 0, done.stderr


def test_the_engine_itself_does_need_torch():
    assert run_blocked(("torch",), "import moegen.run.engine").returncode != 0


def test_the_provider_imports_without_torch_pyarrow_and_the_engine():
    stems = {path.stem for path in modules(PROVIDER)} - {"__init__"}
    if find_spec("airflow.providers.common.ai") is None:
        stems.remove("batch_adapter")  # common-ai's operator loads it, where that is installed
    names = ", ".join(f"moegen_airflow.{stem}" for stem in sorted(stems))
    done = run_blocked(("torch", "transformers", "pyarrow", "moegen"), f"import {names}")
    assert done.returncode == 0, done.stderr


def test_a_laptop_without_torch_can_plan(tmp_path):
    from tests.tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path / "model")
    code = f"from moegen.cli import main; sys.argv = ['moegen', 'plan', '--model', {str(folder)!r}]; main()"
    done = run_blocked(("torch",), code)
    assert done.returncode == 0, done.stderr
    assert "experts per token" in done.stdout

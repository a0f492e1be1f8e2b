"""Every snippet of docs/recipes.md runs, with what the page takes for yours."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = (ROOT / "docs/recipes.md").read_text()
*_, YOURS = re.findall(r"```python\n(.*?)```", RECIPES, re.S)
SECTIONS = re.findall(r"(?ms)^### (.+?)\n(.*?)(?=^##|\Z)", RECIPES)


@pytest.mark.parametrize(("title", "body"), SECTIONS, ids=[t for t, _ in SECTIONS])
def test_recipe_runs_and_names_its_files(title, body, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", body, re.S)
    if title == "Start a real run":
        assert not blocks  # its guides have them
        return
    (block,) = blocks
    if "pydicom" in block:
        pytest.importorskip("pydicom", reason="needs pydicom, an extra")
    if "lifelines" in block:
        pytest.importorskip("lifelines", reason="needs lifelines, for tests only")
    if "import mlflow" in block:
        pytest.importorskip("mlflow", reason="needs MLflow, which is no requirement")
        pytest.importorskip("alembic", reason="needs alembic, as MLflow's store does")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(YOURS, "docs/recipes.md", "exec"), names)
    exec(compile(block, f"docs/recipes.md: {title}", "exec"), names)
    used = set(re.findall(r"from fl_helpers\.(\w+) import", block))
    linked = set(re.findall(r"\.\./fl_helpers/(\w+)\.py", body))
    assert used and used == linked


def test_contents_list_every_recipe():
    anchors = re.findall(r"\]\(#([a-z-]+)\)", RECIPES)
    titles = [title.lower().replace(" ", "-") for title, _ in SECTIONS]
    assert sorted(anchors) == sorted([*titles, "what-the-snippets-take-for-yours"])

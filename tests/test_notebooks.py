"""Execute every notebook with small parameters; check what the committed ones say."""

import importlib
import os
from pathlib import Path

import papermill
import pytest
import yaml

from fl_helpers.record import read_recorded

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
REAL_FILE = ROOT.parent / "shared" / "data" / "pneumoniamnist.npz"

# A new notebook without an entry is a KeyError, so nobody forgets.
SMALL = yaml.safe_load((ROOT / "tools" / "small.yaml").read_text())


def execute(path, folder, **parameters):
    assert parameters.keys() <= papermill.inspect_notebook(str(path)).keys()
    output = folder / path.name
    papermill.execute_notebook(
        str(path),
        str(output),
        parameters,
        kernel_name="python3",
        cwd=str(ROOT / "notebooks"),
        progress_bar=False,
    )
    return read_recorded(output)


def checks(path):
    """The module in tests/lessons/ that says what this notebook must find."""
    return importlib.import_module(f"tests.lessons.check_{path.stem}")


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_small_parameters(path, tmp_path):
    checks(path).small(execute(path, tmp_path, **SMALL[path.stem]))


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_unchanged_on_real_radiographs(path, tmp_path):
    if not REAL_FILE.exists():
        pytest.skip(f"needs the PneumoniaMNIST file, looked for {REAL_FILE}")
    real = {"DATASET": "pneumoniamnist", "DATA_ROOT": str(REAL_FILE)}
    if not real.keys() <= papermill.inspect_notebook(str(path)).keys():
        pytest.skip("this notebook is not about radiographs")
    results = execute(path, tmp_path, **(SMALL[path.stem] | real))
    name = {"01": "centralized", "03": "federated"}.get(path.stem[:2])
    if name:
        assert results[name] > 70  # chance: 50


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not os.environ.get("FULL"), reason="set FULL=1: takes minutes")
def test_the_story_holds_on_real_radiographs_at_full_size(tmp_path):
    path = next(path for path in NOTEBOOKS if path.stem.startswith("03"))
    results = execute(
        path, tmp_path, DATASET="pneumoniamnist", DATA_ROOT=str(REAL_FILE)
    )
    assert results["local"] + 0.5 < results["federated"] < results["centralized"] + 2
    assert results["wins"] >= 8  # of 12


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_tells_the_story(path):
    """The numbers that a reader sees on the forge's page, at default parameters."""
    checks(path).committed(read_recorded(path))

"""Execute every notebook with small parameters; check what the committed ones say."""

import importlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score

from fl_helpers import regression
from fl_helpers.analysis import ask_silos
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
    if path.stem[:2] > "03" and not os.environ.get("FULL"):
        pytest.skip("set FULL=1: takes minutes; the data come in as in 03")
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


# -- the reader's own data: a folder of images, or a CSV file per hospital

OWN = {"North": 160, "South": 140, "East": 130}


def write_own(folder, columns):
    """columns(rng, n): {name: [n]} of one hospital."""
    for number, (name, n) in enumerate(OWN.items()):
        table = pd.DataFrame(columns(np.random.default_rng(number), n))
        table.to_csv(folder / f"{name}.csv", index=False)
    return str(folder / "*.csv")


def path_of(number):
    return next(path for path in NOTEBOOKS if path.stem.startswith(number))


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reader_points_notebook_13_at_their_own_folder(tmp_path):
    """Files of other sizes, some in colour, two classes that nobody can confuse."""
    rng = np.random.default_rng(0)
    for name, count in {"North clinic": 60, "South": 48, "Ost-Süd": 40}.items():
        for k in range(count):
            label = ("fracture", "intact")[k // 2 % 2]
            path = tmp_path / "own" / name / label / f"MR{k // 2:03d}_{k % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = 130 if label == "fracture" else 90
            pixels = rng.normal(shade, 30, rng.integers(180, 300, 2)).clip(0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            (image.convert("RGB") if k % 5 == 0 else image).save(path)
    small = {"ROUNDS": 2, "SEEDS": [0, 1]}
    results = execute(path_of("13"), tmp_path, IMAGES=str(tmp_path / "own"), **small)
    scores = results["scores"]["head only"]
    assert scores.keys() == {"local", "federated", "centralized", "ensemble"}
    assert min(scores.values()) > 80  # chance: 50


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reader_points_notebook_15_at_their_own_tables(tmp_path):
    """The odds ratios are those of all rows in one place."""

    def patients(rng, n):
        age, smoker = rng.normal(60, 10, n).round(), rng.integers(0, 2, n)
        lab = np.where(rng.random(n) < 0.1, np.nan, rng.normal(5, 1, n).round(2))
        risk = 0.05 * (age - 60) + 0.8 * smoker - 0.4
        died = (rng.random(n) < 1 / (1 + np.exp(-risk))) * 1
        return {"age": age, "lab": lab, "smoker": smoker, "died": died}

    files = write_own(tmp_path, patients)
    for name in OWN:
        pd.read_csv(tmp_path / f"{name}.csv").assign(clinic=name).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    ranges = {"age": [18, 100], "lab": [0.1, 50]}
    how = {"SITE": "clinic", "OUTCOME": "died", "RANGES": ranges}
    found = execute(path_of("15"), tmp_path, TABLES=files, **how)["odds_ratios"]
    table = pd.concat(map(pd.read_csv, sorted(tmp_path.glob("*.csv")))).dropna()
    x = [table[c] for c in ("age", "lab", "smoker")]
    x += [table.clinic == name for name in ("North", "South")]  # East is the first
    rows = regression.Table(np.column_stack(x).astype(float), table.died.to_numpy())
    pooled = regression.fit_logistic(ask_silos({"all": rows}), 5)
    names = ["intercept", "age", "lab", "smoker", "North", "South"]
    expected = dict(zip(names, np.exp(pooled.beta).round(2).tolist(), strict=True))
    assert found == pytest.approx(expected)


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reader_points_notebook_16_at_their_own_tables(tmp_path):
    """The hazard ratio is that of lifelines, stratified, on all rows."""
    lifelines = pytest.importorskip("lifelines")

    def patients(rng, n):
        age, stage = rng.normal(size=n), rng.integers(0, 2, n)
        until = rng.exponential(400 / np.exp(0.6 * age + 0.5 * stage))
        leave = rng.exponential(600, n)
        time, event = np.ceil(np.minimum(until, leave)), (until <= leave) * 1
        return {"age": age, "time": time, "stage": stage, "event": event}

    files = write_own(tmp_path, patients)
    found = execute(path_of("16"), tmp_path, TABLES=files, SEEDS=[0])
    parts = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in OWN}
    table = pd.concat([t.assign(site=name) for name, t in parts.items()])
    model = lifelines.CoxPHFitter()
    model.fit(table, "time", "event", strata="site")
    ratio = float(np.exp(model.params_["age"]))
    assert found["hazard_ratio_marker"] == pytest.approx(ratio, abs=6e-4)


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reader_points_notebook_17_at_their_own_tables(tmp_path):
    """The AUROC of each hospital is that of scikit-learn on its file."""

    def patients(rng, n):
        x, z = rng.normal(size=(2, n))
        ill = (rng.random(n) < 1 / (1 + np.exp(-x - z))) * 1
        score, second = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(-x - z))
        group = rng.integers(0, 4, n)
        return {"score": score, "second": second, "ill": ill, "group": group}

    files = write_own(tmp_path, patients)
    small = {"STEPS": 5, "SIZES": [200, 160, 160, 160]}
    found = execute(path_of("17"), tmp_path, TABLES=files, **small)
    assert found["auroc"].keys() == OWN.keys()
    for name, (value, low, high) in found["auroc"].items():
        table = pd.read_csv(tmp_path / f"{name}.csv")
        assert value == pytest.approx(roc_auc_score(table.ill, table.score), abs=6e-4)
        assert low < value < high
    assert found["gains"]["together"][0] > 0  # the second model knows more

"""Execute every notebook with small parameters; check what the committed ones say."""

import os
from pathlib import Path

import pandas
import papermill
import pytest

from fl_helpers.record import read_recorded

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
REAL_FILE = ROOT.parent / "shared" / "data" / "pneumoniamnist.npz"

# A new notebook without an entry here is a KeyError, so nobody forgets.
SMOKE = {
    "01_centralized_baseline": {"SIZES": [300, 200, 160, 120], "ROUNDS": 5},
    "02_hospitals_and_their_data": {"SIZES": [300, 200, 160, 120]},
    "03_fedavg_from_scratch": {
        "SIZES": [400, 300, 200, 120],
        "ROUNDS": 6,
        "SEEDS": [0],
    },
    "04_when_hospitals_differ": {"SIZES": [300, 200, 160, 120], "ROUNDS": 2},
}


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


def check_smoke(name, results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    if name.startswith("01"):
        assert results["centralized"] > 45 and results["local"] > 40  # chance: 33.3
    if name.startswith("02"):
        assert results["largest_difference_to_pooled"] < 1e-7
        assert 0.2 < results["label_skew_knob_1"] < 0.4
    if name.startswith("03"):
        assert results["federated"] > 45  # chance: 33.3
        assert results["largest_difference"] < 1e-5
        assert results["pairs"] == 4
    if name.startswith("04"):
        assert results["mean"]["Centralized"] > 40  # chance: 33.3
        assert len(results["mean"]) == 15
        assert (
            -1 <= min(results["drift"].values()) <= max(results["drift"].values()) <= 1
        )


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_small_parameters(path, tmp_path):
    check_smoke(path.stem, execute(path, tmp_path, **SMOKE[path.stem]))


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_unchanged_on_real_radiographs(path, tmp_path):
    if not REAL_FILE.exists():
        pytest.skip(f"needs the PneumoniaMNIST file, looked for {REAL_FILE}")
    real = {"DATASET": "pneumoniamnist", "DATA_ROOT": str(REAL_FILE)}
    results = execute(path, tmp_path, **(SMOKE[path.stem] | real))
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


def test_the_committed_notebooks_tell_the_story():
    """The numbers that a reader sees on the forge's page, at default parameters."""
    recorded = {path.stem[:2]: read_recorded(path) for path in NOTEBOOKS}
    first, third = recorded["01"], recorded["03"]
    assert first["local"] + 5 < first["centralized"]
    assert third["local"] + 5 < third["federated"] < third["centralized"] + 1
    assert third["wins"] == third["pairs"] == 12  # the README says: every pair
    assert third["centralized"] > 80 and third["local"] > 60
    assert third["largest_difference"] < 1e-5
    assert recorded["02"]["largest_difference_to_pooled"] < 1e-7
    fourth = recorded["04"]
    assert fourth["drift"]["different"] < fourth["drift"]["alike"]
    assert fourth["mean"]["Own statistics"] > fourth["mean"]["FedAvg"] + 5
    ranks = fourth["ranks"]
    assert ranks["own statistics over FedAvg"]["feature_distance"] > 0.4
    assert max(map(abs, ranks["FedAvg over local"].values())) < 0.5  # none says it well
    assert ranks["FedAvg over local"]["size_share"] < 0


def test_the_full_experiment_says_what_the_notebook_and_the_readme_say():
    table = pandas.read_csv(ROOT / "docs/results/strategies.csv")
    seeds = ["federation", "seed"]
    score = 100 * table.pivot_table("balanced_accuracy", seeds, "strategy")
    above = score.sub(score["FedAvg"], axis=0).drop(columns=["FedAvg", "Centralized"])
    mean = above.groupby("federation").mean()
    clear = ((above > 0).groupby("federation").mean() >= 0.9) & (mean >= 1)
    assert (
        table.federation.nunique() == 10
        and score.groupby("federation").size().min() == 5
    )
    for place in ("synthetic: scanner, full", "pneumoniamnist: scanner, full"):
        assert mean.loc[place, "Local"] > 0  # FedAvg is worse than staying alone
        assert clear.loc[place, ["Own statistics", "FedBN", "Fine-tuning"]].all()
    label = mean.index[mean.index.str.contains("label mix|Dirichlet")]
    assert len(label) == 4 and (mean.loc[label, "Local"] < -2).all()
    assert clear.loc[label].to_numpy().sum() == 1  # SCAFFOLD, at the strongest skew
    assert (mean.loc[label, "FedPer"] < -1).all()
    assert clear.loc["heart: by site", "Local bias"]
    rules = ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedNova", "q-FedAvg"]
    assert not clear[rules].to_numpy().any()

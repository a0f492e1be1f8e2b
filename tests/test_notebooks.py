"""Execute every notebook with small parameters; check what the committed ones say."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

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
    "05_privacy_attacks_and_defences": {
        "SIZES": [640, 320, 240, 200],
        "ROUNDS": 2,
        "ITERATIONS": 20,
        "SHADOW_EPOCHS": 3,
    },
    "06_faults_and_poisoned_updates": {
        "SIZES": [400, 320, 320, 240, 240, 240],
        "ROUNDS": 6,
    },
    "07_cross_silo_on_your_machines": {"SIZES": [300, 200, 160, 120], "ROUNDS": 2},
    "08_cross_silo_on_azure_ml": {"SIZES": [300, 200, 160, 120], "ROUNDS": 1},
    "09_bring_your_own_data": {
        "SIZES": [300, 200, 160, 120],
        "ROUNDS": 4,
        "SEEDS": [0, 1],
    },
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


def checks(path):
    """The module in tests/lessons/ that says what this notebook must find."""
    return importlib.import_module(f"tests.lessons.check_{path.stem}")


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_small_parameters(path, tmp_path):
    checks(path).small(execute(path, tmp_path, **SMOKE[path.stem]))


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_unchanged_on_real_radiographs(path, tmp_path):
    if not REAL_FILE.exists():
        pytest.skip(f"needs the PneumoniaMNIST file, looked for {REAL_FILE}")
    real = {"DATASET": "pneumoniamnist", "DATA_ROOT": str(REAL_FILE)}
    if not real.keys() <= papermill.inspect_notebook(str(path)).keys():
        pytest.skip("this notebook is not about radiographs")
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_tells_the_story(path):
    """The numbers that a reader sees on the forge's page, at default parameters."""
    checks(path).committed(read_recorded(path))


@pytest.fixture(scope="module")
def experiment():
    """Points above FedAvg, per federation and seed, and which of them are clear."""
    table = pandas.read_csv(ROOT / "docs/results/strategies.csv")
    score = 100 * table.pivot_table("balanced_accuracy", FEDERATION_SEED, "strategy")
    above = score.sub(score["FedAvg"], axis=0).drop(columns=["FedAvg", "Centralized"])
    mean = above.groupby("federation").mean()
    clear = ((above > 0).groupby("federation").mean() >= 0.9) & (mean >= 1)
    return SimpleNamespace(table=table, score=score, mean=mean, clear=clear)


FEDERATION_SEED = ["federation", "seed"]
SCANNERS = ["synthetic: scanner, full", "pneumoniamnist: scanner, full"]
LABELS = [
    "synthetic: label mix, full",
    "pneumoniamnist: Dirichlet 0.5",
    "pneumoniamnist: Dirichlet 0.1",
]


def test_other_scanners_need_other_normalisation(experiment):
    assert (experiment.mean.loc[SCANNERS, "Local"] > 0).all()  # FedAvg below local
    repaired = ["Own statistics", "FedBN", "Fine-tuning"]
    assert experiment.clear.loc[SCANNERS, repaired].all(axis=None)
    first = ["FedProx", "SCAFFOLD"]  # remedies for client drift
    assert not experiment.clear.loc[SCANNERS, first].any(axis=None)


def test_other_label_mixes_leave_little_to_repair(experiment):
    assert (experiment.mean.loc[LABELS, "Local"] < -5).all()  # FedAvg far above local
    assert experiment.clear.loc[LABELS].sum(axis=None) == 1  # SCAFFOLD, once
    assert (experiment.mean.loc[LABELS, "FedPer"] < -5).all()


def test_real_hospitals_keep_their_own_threshold(experiment):
    assert experiment.clear.loc["heart: by site", "Local bias"]
    heart = experiment.table.query("federation == 'heart: by site'")
    pairs = heart.pivot_table("balanced_accuracy", ["silo", "seed"], "strategy")
    assert (pairs["Local bias"] < pairs["Local"]).any()  # some do better alone


def test_server_rules_never_clearly_help_and_may_collapse(experiment):
    rules = ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedNova", "q-FedAvg"]
    assert not experiment.clear[rules].any(axis=None)
    alike = experiment.score.loc["synthetic: nothing"]
    assert alike["FedAvgM"].min() < 50 and alike["FedNova"].min() < 50


def test_the_worst_hospital_needs_normalisation_more_than_weight(experiment):
    by = [*FEDERATION_SEED, "strategy"]
    worst = 100 * experiment.table.groupby(by).balanced_accuracy.min().unstack()
    worst = worst.sub(worst["FedAvg"], axis=0).groupby("federation").mean()
    assert worst["q-FedAvg"].max() < 5
    assert (worst.loc[SCANNERS, ["Own statistics", "FedBN"]] > 15).all(axis=None)


def test_who_lost_much_was_far_and_some_who_were_far_gained(experiment):
    diagnosis = pandas.read_csv(ROOT / "docs/results/diagnosis.csv")
    silo = ["federation", "silo"]
    far = diagnosis.groupby(silo).feature_distance.mean()
    pairs = experiment.table.pivot_table("balanced_accuracy", silo, "strategy")
    gain = 100 * (pairs["FedAvg"] - pairs["Local"])
    assert (gain < -3).sum() >= 5 and far[gain < -3].min() > 0.5
    assert (gain[far > 0.5] > 3).sum() >= 3


@pytest.fixture(scope="module")
def privacy():
    """Mean balanced accuracy over hospitals, [approach and level, seed]."""
    table = pandas.read_csv(ROOT / "docs/results/privacy.csv", dtype={"level": str})
    by = ["approach", "level", "seed"]
    return 100 * table.groupby(by).balanced_accuracy.mean().unstack()


def test_privacy_costs_accuracy_and_a_federation_costs_less(privacy):
    levels = ["0.5", "1.0", "3.0", "8.0", "inf"]
    together, alone = (
        privacy.loc[name].loc[levels] for name in ("DP-SGD", "DP-SGD alone")
    )
    assert together.mean(axis=1).is_monotonic_increasing
    assert (together.mean(axis=1) > alone.mean(axis=1) + 4).all()
    lost = privacy.loc["FedAvg", "none"] - together.loc["8.0"]
    assert (lost > 15).all() and privacy.shape[1] == 5


def test_silo_level_noise_drowns_a_model_of_four(privacy):
    assert privacy.loc["silo level", "1.0"].max() < 40  # chance: 33
    assert (
        privacy.loc["silo level", "0.1"].mean()
        < privacy.loc["silo level", "0.0"].mean()
    )


def test_8_bits_cost_nothing_and_one_percent_costs_all(privacy):
    assert (
        abs(privacy.loc["compressed", "8 bits"] - privacy.loc["FedAvg", "none"]).max()
        < 1
    )
    assert privacy.loc["compressed", "top 1 %"].mean() < 60


def test_inversion_works_on_one_step_and_not_on_noise():
    table = pandas.read_csv(ROOT / "docs/results/privacy_attacks.csv")
    found = table.query("attack == 'inversion'").pivot_table(
        "value", "condition", "measure"
    )
    guess = found["ssim of a public mean image"].iloc[0]
    works = [
        "one image, one step",
        "one image, 5 steps",
        "one image, 20 steps",
        "batch of 2",
    ]
    assert found.ssim[works].min() > guess + 0.2
    assert found.ssim.drop(works).max() < guess + 0.02  # knows no more than the mean
    assert found.ssim["DP-SGD, epsilon 8"] < 0.05


@pytest.fixture(scope="module")
def poisoning():
    """Percent, mean over seeds: [attack, malicious, heterogeneity, rule]."""
    table = pandas.read_csv(ROOT / "docs/results/poisoning.csv")
    by = ["attack", "malicious", "heterogeneity", "rule"]
    assert table.seed.nunique() == 3
    return 100 * table.groupby(by)[["balanced_accuracy", "attack_success"]].mean()


EQUAL_VOTES = ["median", "trimmed mean", "geometric median"]


def test_equal_votes_keep_the_accuracy_against_one_liar(poisoning):
    accuracy = poisoning.balanced_accuracy.unstack()
    one = accuracy.xs((1, 0.25), level=("malicious", "heterogeneity")).drop("none")
    assert one[EQUAL_VOTES].min(axis=None) > 75 and one["Krum"].min() > 68
    assert one.loc["labels, x5", "weighted average"] < 50
    assert (
        one.loc["labels, claims x10", ["weighted average", "norm clipping"]].max() < 30
    )


def test_two_liars_where_one_was_expected(poisoning):
    two = poisoning.balanced_accuracy.unstack().xs(
        (2, 0.25), level=("malicious", "heterogeneity")
    )
    assert two.loc[["labels, x5", "sign, x3"], "trimmed mean"].max() < 45
    assert two.loc["labels", ["Krum", "Multi-Krum"]].max() < 65
    assert two.loc["labels", "median"] > 70


def test_a_quiet_backdoor_passes_most_rules(poisoning):
    success = poisoning.attack_success.unstack()
    success = success.xs(0.25, level="heterogeneity")
    quiet, loud = success.loc["backdoor"], success.loc["backdoor, x5"]
    assert quiet.loc[2].drop(["Krum", "without them"], errors="ignore").min() > 90
    assert loud.loc[2, ["Krum", "Multi-Krum"]].max() < 30
    assert quiet.loc[1, "Multi-Krum"] > 95
    assert quiet.loc[1, ["median", "trimmed mean"]].max() < 55


def test_robust_rules_cost_more_the_more_hospitals_differ(poisoning):
    accuracy = poisoning.balanced_accuracy.unstack().loc["none", 0]
    lost = accuracy.sub(accuracy["weighted average"], axis=0)
    rules = ["median", "trimmed mean", "Krum", "Multi-Krum", "geometric median"]
    assert (lost.loc[1.0, rules] < lost.loc[0.25, rules] - 3).all()
    assert lost.loc[0.25, EQUAL_VOTES].min() > -2
    assert lost["Krum"].max() < -9

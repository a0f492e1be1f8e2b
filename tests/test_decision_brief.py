"""Each number of the decision brief, and the measured ones of the impact assessment,
from the committed results or their formula."""

import csv
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from fl_helpers.planning import run_cost
from fl_helpers.privacy import Budget, epsilon_spent, noise_for

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
BRIEF = " ".join((ROOT / "docs/decision-brief.md").read_text().split())
ASSESSMENT = " ".join((ROOT / "docs/impact-assessment.md").read_text().split())
PLANNED, DELTA = 0.001, 0.00001  # of the experiment, and of the table


@pytest.fixture(scope="module")
def attacks():
    found = pd.read_csv(RESULTS / "privacy_attacks.csv")
    index = ["attack", "condition", "seed"]
    return found.pivot(index=index, columns="measure", values="value")


@pytest.fixture(scope="module")
def accuracy():
    """Mean over the hospitals and seeds, in percent."""
    found = pd.read_csv(RESULTS / "privacy.csv", dtype={"level": str})
    assert found.groupby(["approach", "level"]).seed.nunique().eq(5).all()
    return 100 * found.groupby(["approach", "level"]).balanced_accuracy.mean()


def closer(victims):
    """Victims to whom the attack came closer than their own public mean image did."""
    count = (victims["ssim"] > victims["ssim of a public mean image"]).sum()
    return f"{count} of {len(victims)}"


def test_what_an_update_gave_away_per_victim(attacks):
    inversion = attacks.loc["inversion"]
    one = inversion.loc["one image, one step"]["ssim"]
    assert len(one) == 8 and round(one.min(), 3) == 0.998
    assert "all eight images came back nearly identical" in BRIEF
    assert f"at least {one.min():.3f} of 1" in BRIEF
    for condition, text in {
        "batch of 2": "{} victims in a batch of two",
        "batch of 4": "{} in a batch of four",
        "batch of 8": "{} in a batch of eight",
        "sum of 4 silos, one image each": "{} in a sum of four hospitals",
        "DP-SGD, epsilon 8": "{} with noise for epsilon 8",
    }.items():
        assert text.format(closer(inversion.loc[condition])) in BRIEF, condition


def test_what_a_linear_layer_and_an_overfitted_model_gave_away(attacks):
    back = attacks.loc["inversion of a linear layer", "8"]
    back = 100 * back["recovered above 30 dB"]
    assert len(back) == 8
    assert f"{back.min():.0f} to {back.max():.0f} % of the eight images" in BRIEF
    found = attacks.loc["membership", "150 images, 30 epochs"]
    found = 100 * found["likelihood ratio: tpr"]
    assert len(found) == 3 and "(three seeds)" in BRIEF
    assert f"{found.min():.0f} to {found.max():.0f} % of the patients" in BRIEF


def at_our_delta(planned):
    """Epsilon of the noise that the experiment planned for another delta."""
    table = pd.read_csv(RESULTS / "privacy.csv", dtype={"level": str})
    (options,) = table.query(
        "approach == 'DP-SGD' and level == @planned"
    ).options.unique()
    rate, steps = (json.loads(options)[name] for name in ("rate", "steps"))
    plan = {"sample_rate": rate, "steps": 10 * steps}  # ten rounds
    noise = noise_for(Budget(float(planned), PLANNED), **plan)
    return epsilon_spent(((noise, rate, 10 * steps),), DELTA)


@pytest.mark.parametrize("planned", ["0.5", "1.0", "3.0", "8.0"])
def test_epsilon_in_odds_and_in_accuracy(planned, accuracy):
    epsilon = at_our_delta(planned)
    factor = math.exp(epsilon)
    even = 100 * factor / (1 + factor)
    found = min(factor * 0.01 + DELTA, 1 - (0.99 - DELTA) / factor)
    cells = [
        f"{epsilon:.2f}",
        f"{factor:,.0f}" if factor > 100 else f"{factor:.1f}",
        f"{even:.1f} %",
        f"{100 * found:.1f} %",
        f"{accuracy['DP-SGD', planned]:.1f} %",
        f"{accuracy['DP-SGD alone', planned]:.1f} %",
    ]
    assert f"| {' | '.join(cells)} |" in BRIEF


def test_what_privacy_was_compared_with(accuracy):
    assert f"the federation reached {accuracy['FedAvg', 'none']:.1f} %" in BRIEF
    assert f"alone brought it to {accuracy['DP-SGD', 'inf']:.1f} %" in BRIEF
    assert f"guessing scores {100 / 3:.1f} %" in BRIEF  # three classes
    experiment = (ROOT / "experiments/privacy.py").read_text()
    assert re.search(r"DELTA = .*, 1e-3\n", experiment)
    with (RESULTS / "privacy.csv").open() as file:
        sent = {
            r["bytes_up"] for r in csv.DictReader(file) if r["approach"] == "FedAvg"
        }
    assert [f"{int(size):,}" for size in sent] == ["30,916"] and "30,916 bytes" in BRIEF


def test_what_it_costs():
    plan = (ROOT / "docs/plan-your-fl-project.md").read_text()
    rows = re.findall(
        r"(?m)^\| \[\d .*?\| (\d+) to (\d+)( per hospital| a month)? \|", plan
    )
    once = [row for row in rows if row[2] != " a month"]
    days = [sum(int(r[k]) * (4 if r[2] else 1) for r in once) for k in (0, 1)]
    assert len(rows) == 10 and f"{days[0]} to {days[1]} working days" in BRIEF
    assert "then {} to {} a month".format(*rows[-1]) in BRIEF
    cost = run_cost(40_000_000, silos=4, rounds=50, training_minutes=30, mbit_per_s=50)
    assert "A 40 MB model, 50 rounds of 30 minutes and a line of 50 Mbit/s" in BRIEF
    sizes = cost["gigabytes"], cost["hours"], cost["machine_hours"]
    text = "{:.0f} GB, {:.0f} hours and {:.0f} machine hours".format(*sizes)
    assert text in BRIEF


def test_it_stays_a_brief_without_code():
    text = (ROOT / "docs/decision-brief.md").read_text()
    words = re.sub(r"\]\([^)]*\)|(?m:^\|[-|]+$)|\|", " ", text).split()
    assert "```" not in text and sum(bool(re.search(r"\w", w)) for w in words) <= 950


def test_what_the_impact_assessment_took_from_the_results(attacks, accuracy):
    inversion = attacks.loc["inversion"]
    for norm in ("BatchNorm", "GroupNorm"):
        count = closer(inversion.loc[f"small_cnn, {norm}, one image"])
        assert f"{count} with {norm}" in ASSESSMENT
    assert f"for {closer(inversion.loc['batch of 4'])}, and with our" in ASSESSMENT
    mix = 100 * attacks.loc["label mix"].filter(like="lr 0.005, one epoch", axis=0)
    error, equal = mix["largest error"], mix["largest error of an equal mix"]
    assert f"{error.min():.0f} to {error.max():.0f} percentage points" in ASSESSMENT
    assert equal.nunique() == 1 and f"off by {equal.iloc[0]:.0f} (" in ASSESSMENT
    found = pd.read_csv(RESULTS / "privacy.csv")
    found = found[found.approach.isin(["FedAvg", "FedAvg, GroupNorm"])]
    assert f"AUROC at most {found.membership_auroc.max():.2f};" in ASSESSMENT
    lost = accuracy["FedAvg", "none"] - accuracy["DP-SGD"]
    epsilons = {level: f"{at_our_delta(level):.1f}" for level in ("3.0", "1.0")}
    text = f"epsilon {epsilons['3.0']} cost the federation {lost['3.0']:.1f} points"
    text += (
        f" of balanced accuracy and epsilon {epsilons['1.0']} cost {lost['1.0']:.1f}"
    )
    assert text in ASSESSMENT
    experiment = (ROOT / "experiments/privacy.py").read_text()
    assert re.search(
        r"SIZES, TEST_SHARE, .* = \(1600, 1200, 800, 400\), 0\.5", experiment
    )
    assert "800, 600, 400 and 200 of them for training and as many" in ASSESSMENT


def test_the_levels_of_the_impact_assessment_follow_from_its_scale():
    found = re.findall(r"(\d) × (\d) = (\d+) \**(low|medium|high)", ASSESSMENT)
    assert len(found) == 33  # eleven risks: before, today, with all
    for likelihood, severity, product, level in found:
        number = int(likelihood) * int(severity)
        assert number == int(product)
        assert level == ("low" if number <= 3 else "medium" if number <= 6 else "high")
    high = re.findall(r"\| (R\d+) \|[^|]*\|[^|]*\|[^|]*\|[^|]*\*\*high", ASSESSMENT)
    assert "{}, {} and {} are high today".format(*high) in ASSESSMENT


def test_ten_images_of_a_patient_leave_no_guarantee_from_where_the_brief_says():
    """Of k records: k epsilon, and k exp((k - 1) epsilon) delta (Dwork, Roth 2014)."""
    assert "delta 10 · exp(9 · epsilon) times, no guarantee from 1.45 on" in BRIEF
    deltas = {e: 10 * math.exp(9 * e) * DELTA for e in (0.75, 1.45)}
    assert deltas[0.75] < 0.1 and deltas[1.45] > 1

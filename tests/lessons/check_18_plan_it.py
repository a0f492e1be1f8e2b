"""What notebooks/18_plan_it.ipynb must find."""

from pathlib import Path

from fl_helpers.planning import patients_needed


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert len(results["pilot"]["federated (%)"]) == 4
    assert min(results["pilot"]["federated (%)"].values()) > 50
    assert results["trains"] == ["Hospital A", "Hospital C", "Hospital D"]


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    pilot, plan = results["pilot"], results["plan"]
    for points in (2, 3, 5):
        for name, patients in plan[f"needed to see {points} points"].items():
            share = pilot["they differ for (%)"][name] / 100  # with one decimal
            assert abs(patients / patients_needed(points / 100, share) - 1) < 0.03
    visible = plan["smallest visible gain"]
    assert visible["Hospital A"] < 5 < 10 < visible["Hospital D"]
    brief = Path(__file__).parents[2] / "docs/decision-brief.md"  # from the plan guide
    words = " ".join(brief.read_text().split())
    assert "{} to {} working days".format(*results["days"]) in words

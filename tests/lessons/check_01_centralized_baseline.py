"""What notebooks/01_centralized_baseline.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["centralized"] > 45 and results["local"] > 40  # chance: 33.3


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["local"] + 5 < results["centralized"]
    assert results["gain_without_largest"] > 4  # one hospital alone does not carry it
    assert results["worst_hospital"] == "Hospital D"
    rows, columns = (
        results[name].values() for name in ("by_trained_at", "by_tested_at")
    )
    assert max(rows) - min(rows) > 3 * (max(columns) - min(columns))  # the prediction
    assert abs(results["local"] - results["elsewhere"]) < 5  # travel costs little here

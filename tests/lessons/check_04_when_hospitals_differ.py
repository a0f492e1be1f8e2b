"""What notebooks/04_when_hospitals_differ.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["Centralized"] > 40  # chance: 33.3
    assert results["FedBN"] != results["FedAvg"]
    assert results["start_with"]["heart: by site"] == "Local bias"


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert max(results["drift"]["different"]) < min(results["drift"]["alike"])
    assert results["Own statistics"] > results["FedAvg"] + 5
    ranks = results["ranks"]
    assert ranks["own statistics over FedAvg"]["feature_distance"] > 0.4
    assert max(map(abs, ranks["FedAvg over local"].values())) < 0.5  # none says it well
    assert ranks["FedAvg over local"]["size_share"] < -0.3
    assert ranks["FedAvg over local"]["label_divergence"] > 0.3

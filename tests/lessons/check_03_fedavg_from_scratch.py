"""What notebooks/03_fedavg_from_scratch.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["federated"] > 45  # chance: 33.3
    assert results["largest_difference"] < 1e-5
    assert results["pairs"] == 8


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["local"] + 5 < results["federated"] < results["centralized"] + 1
    assert results["wins"] == results["pairs"] == 12  # the README says: every pair
    assert results["centralized"] > 80 and results["local"] > 60
    assert results["largest_difference"] < 1e-5
    # Intervals [low, high] of differences in points.
    assert results["gain"]["local"][0] > 0
    assert results["gain"]["ensemble"][0] > 0
    assert results["gain"]["local, without Hospital D"][0] > 0
    assert results["equal_weights"]["Hospital A"][1] < 0
    assert results["equal_weights"]["ill, called normal"][0] > 0
